"""The log of a run: one JSON object a line beside the output, the experiment tracker, and whoever watches.

Only the first process writes. A resumed run drops the lines after the state it goes on from. The first line says whose log
it is: a file of that name without it is somebody else's, and no run begins.
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from spmconvert.errors import OutputError
from spmconvert.recipe.recipe import Training
from spmconvert.system.files import write_errors, write_whole
from spmconvert.system.parsing import parse_json

MARK = {"log": "spmconvert finetune"}


def log_file(output: Path) -> Path:
    """Where the log of a run is that writes ``output``."""
    resolved = Path(os.path.realpath(output))
    return resolved.with_name(f"{resolved.name}.jsonl")


def check_log(output: Path) -> None:
    """Refuse a run whose log would overwrite a file that is no log.

    Raises:
        OutputError: when there is such a file.
    """
    file = log_file(output)
    if os.path.lexists(file) and not _is_log(file):
        raise OutputError(
            f"the log of this run would overwrite {file}, which is no log of spmconvert; choose another output with -o"
        )


def _is_log(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        first = stream.readline(1000)
    try:
        return bool(parse_json(first) == MARK)
    except ValueError:
        return False


class RunLog:
    """Writes what a training run reports.

    Args:
        output: directory the run will write; the log is the same name with ``.jsonl``.
        accelerator: of the run.
        training: recorded by trackers.
        snapshot: what the run goes on from, or None.
        report: told about every record as well.
    """

    def __init__(
        self,
        output: Path,
        accelerator: Any,
        training: Training,
        snapshot: dict[str, Any] | None,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._accelerator, self._report = accelerator, report
        self._file = log_file(output)
        self._last_step = -1 if snapshot is None else snapshot["state"]["step"]
        self._training = training
        self._stream: IO[str] | None = None

    def __enter__(self) -> Self:
        """Open the log."""
        if self._accelerator.log_with:
            self._accelerator.init_trackers("spmconvert", config=self._training.model_dump(mode="json"))
        if self._accelerator.is_main_process:
            before = [line for line in self._lines() if 0 <= _step(line) <= self._last_step]
            with self._writing():
                # whole or not at all: half of a mark would be somebody else's file
                write_whole(self._file, "".join(f"{line}\n" for line in (json.dumps(MARK), *before)))
                self._stream = self._file.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Close the log."""
        if self._accelerator.log_with:
            self._accelerator.end_training()
        if self._stream is not None:
            # what is left in its buffer could not be written before, which has been said
            with suppress(OSError):
                self._stream.close()

    def write(self, record: dict[str, Any]) -> None:
        """Pass a record on."""
        if self._stream is None:
            return
        with self._writing():
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        if self._accelerator.log_with and "layer" not in record:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
            self._accelerator.log(numbers, step=record["step"])
        self._report(record)

    def _writing(self) -> AbstractContextManager[None]:
        return write_errors(self._file, "choose another output with -o", "continue with --resume")

    def _lines(self) -> list[str]:
        if self._last_step < 0 or not self._file.exists():
            return []
        written = self._file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        return written


def _step(line: str) -> int:
    """The step that a line is of, 0 for one of no step; below that for one that a kill cut short."""
    try:
        record = parse_json(line)
    except ValueError:
        return -1
    step = record.get("step", 0) if isinstance(record, dict) else -1
    return step if isinstance(step, int) else -1
