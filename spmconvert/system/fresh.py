"""Running one function in a fresh interpreter: what holds there holds for a user, and its memory is its own.

Arguments and result are JSON; the result goes through a file, so that nothing a library prints can get in between. The
process reads no input, and imports nothing from the working directory, which may be a checkpoint that somebody else made.
``multiprocessing`` is not used: a process that it spawns runs the caller's main module again, and starts with the working
directory on its path.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import spmconvert
from spmconvert.errors import SpmconvertError
from spmconvert.system.parsing import parse_json


def run_fresh(function: str, *arguments: Any) -> Any:
    """Call ``module:function`` in a new process.

    Args:
        function: its module and name.
        arguments: JSON values.

    Returns:
        What the function returned.

    Raises:
        SpmconvertError: when the process ended without an answer, with its last line or the signal that ended it.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        command = [sys.executable, "-m", "spmconvert.system.fresh", function, json.dumps(arguments), str(answer)]
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=child_environment()
        )
        if not answer.exists():
            last = (ended.stderr.strip().splitlines() or [f"it ended with code {ended.returncode}"])[-1]
            reason = last if ended.returncode >= 0 else _signal(-ended.returncode)
            raise SpmconvertError(f"a fresh process could not run {function}: {reason}")
        return parse_json(answer.read_text(encoding="utf-8"))


def _signal(number: int) -> str:
    """What ended a process, in words."""
    name = signal.Signals(number).name
    return f"it was ended by {name}" + ", as the system does where memory runs out" * (name == "SIGKILL")


def child_environment() -> dict[str, str]:
    """Environment of Python processes that import this very package, and nothing from the directory they start in."""
    # an empty entry would be the working directory
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # the same package as here, also where it is run from its source tree
    places = [str(Path(spmconvert.__file__).parents[1]), *others]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def main(function: str, arguments: str, answer: str) -> None:
    """The other side: call the function and leave its result in a file."""
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(*parse_json(arguments))
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
