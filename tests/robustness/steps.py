"""What a command does to files, as a list of steps; and what is left where it is stopped before one of them.

Python tells audit hooks of every file that it opens, renames, makes or removes before it does so; the flush to the disk and
the files that safetensors writes are told of here. A hook cannot be taken out again, so a command runs in a child that is
forked once everything is imported: a kill then costs what the command itself does, and not the seconds of imports.

``kill`` ends the process before a step. ``tear`` ends it with a file open whose first bytes alone were written, which is
what a kill in the middle of a write leaves. ``fill`` lets a step, and everything after it that needs room, fail for want of
space.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = 137
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# names of audit events that change a file system, each with the number of its path
CHANGES = {"os.mkdir": 0, "os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.truncate": 0}
# those that need no room
FREE = ("os.remove", "os.rmdir")


@dataclass(frozen=True)
class Step:
    """One operation: its name, and the path below the root that it is done to."""

    name: str
    path: str

    @property
    def writes(self) -> bool:
        """Whether a file's content follows."""
        return self.name == "open"


class Watch:
    """Counts the steps below a directory, and stops at one.

    Args:
        root: of everything that counts.
        at: number of the step to stop at; None for none.
        how: ``kill``, ``tear`` or ``fill``.
    """

    def __init__(self, root: Path, at: int | None = None, how: str = "kill") -> None:
        self.root, self.at, self.how = os.path.realpath(root), at, how
        self.steps: list[Step] = []
        self._is_ours = False

    def install(self) -> None:
        """From here on, until the process ends."""
        import safetensors.torch

        sync, save = os.fsync, safetensors.torch.save_file

        def synced(descriptor: int) -> None:
            self.step("fsync", os.fspath(Path(f"/proc/self/fd/{descriptor}").readlink()))
            sync(descriptor)

        def saved(tensors: Any, file: Any, *rest: Any) -> None:
            self.step("open", os.fspath(file))
            save(tensors, file, *rest)

        os.fsync, safetensors.torch.save_file = synced, saved
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_ours:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & WRITING:
                # a file without a name is opened by its directory
                self.step("tmpfile" if Path(os.fsdecode(path)).is_dir() else "open", os.fsdecode(path))
        elif event in CHANGES:
            path = arguments[CHANGES[event]]
            if isinstance(path, str | bytes | os.PathLike):
                self.step(event, os.fsdecode(path))

    def step(self, name: str, path: str) -> None:
        """Take one step, unless it is the one to stop at."""
        # names beside a descriptor, as rmtree has them, are below what was opened
        place = os.path.abspath(path)  # noqa: PTH100 - links stay as they are
        inside = place.startswith(self.root + os.sep) or (not Path(path).is_absolute() and name in FREE)
        if not inside or self._is_ours:
            return
        self.steps.append(Step(name, os.path.relpath(place, self.root)))
        number = len(self.steps) - 1
        if self.at is None or number < self.at:
            return
        if self.how == "fill":
            if name not in FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return
        if self.how == "tear" and name == "open":
            self._is_ours = True
            # what was there before a line was begun stays, where lines are added
            before = Path(place).read_bytes() if place.endswith(".jsonl") and Path(place).exists() else b""
            Path(place).write_bytes(before + b'{"')
        os._exit(KILLED)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it said on standard error, and the steps it took where it was not killed."""

    code: int
    said: str
    steps: list[Step]
    modules: list[str]

    @property
    def line(self) -> str:
        """Its error, or the empty string."""
        return next((line for line in self.said.splitlines() if line.startswith("error: ")), "")


def run_forked(command: Sequence[str], watch: Watch, before: Callable[[], None] = lambda: None) -> Ended:
    """Run a command line in a child of this process."""
    said, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(said[1], 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            before()
            watch.install()
            code = _run(command)
        except BaseException:
            traceback.print_exc()
        watch._is_ours = True
        sys.stderr.flush()
        content = {"steps": [(step.name, step.path) for step in watch.steps], "modules": sorted(sys.modules)}
        with os.fdopen(told[1], "w") as stream:
            json.dump(content, stream)
        os._exit(code)
    os.close(said[1])
    os.close(told[1])
    with os.fdopen(said[0], errors="replace") as stream, os.fdopen(told[0]) as other:
        # the longer one first: a pipe that is full would be waited for
        content, text = other.read(), stream.read()
    _, status = os.waitpid(child, 0)
    found = json.loads(content or '{"steps": [], "modules": []}')
    return Ended(os.waitstatus_to_exitcode(status), text, [Step(*step) for step in found["steps"]], found["modules"])


def _run(command: Sequence[str]) -> int:
    from spmconvert.cli.app import main

    sys.argv = ["spmconvert", *command]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
