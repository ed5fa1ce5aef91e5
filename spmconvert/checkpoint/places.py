"""Whose is what is there, and what of it may be replaced or removed.

An output whose files this tool wrote, all of them, as its ``checksums.sha256`` says; a working directory, which is the
hidden sibling ``.<name>.partial`` with the ``run.json`` of an earlier run; an old output that a run of this tool has put
aside. Anything else is somebody else's, and an error, with ``--force``, too. This module does not import torch.
"""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from spmconvert.checkpoint.checksums import UNLISTED_FILES, read_checksums
from spmconvert.errors import CheckpointError, OptionError, OutputError
from spmconvert.system.files import sync
from spmconvert.system.parsing import parse_json

# what runs keep beside finished layers: a finetune its training state, a conversion to a budget what it chose
STATE_FILE = "state.bin"
CHOICE_FILE = "choice.json"
BATCHES_FILE = "batches.json"
# the marks of a working directory: which run it is, and that it has begun to put its result in place
RUN_FILE = "run.json"
COMMIT_FILE = "commit.json"
FINAL_DIRECTORY = "final"


def check_apart(output: Path, reads: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that is, holds, or lies inside of anything that a run reads; links are followed.

    Args:
        output: where the run would write.
        reads: files and directories that it reads, by what they are; None and what is not there are no concern.

    Raises:
        OptionError: when they are not apart.
    """
    target = Path(os.path.realpath(output))
    for what, path in reads.items():
        if path is None or not os.path.lexists(path):
            continue
        source = Path(os.path.realpath(path))
        if target == source:
            relation = "is"
        elif target.is_relative_to(source) and source.is_dir():
            relation = "lies inside of"
        elif source.is_relative_to(target):
            relation = "holds"
        else:
            continue
        raise OptionError(f"the output {output} {relation} the {what} {path}, which the run reads; choose another with -o")


def check_output(output: Path, *, force: bool, carried: Collection[str] = ()) -> None:
    """Refuse a place that may not be written; cheap, so a run can ask before its long work and again when it has the lock.

    Args:
        output: where the run would write.
        force: replace an output of this tool.
        carried: files of the output that the new one has, too.

    Raises:
        OutputError: when something is there, and ``force`` is not given or does not replace it.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file, which --force does not replace; choose another output with -o")
    foreign = [name for name in foreign_files(output) if name not in carried]
    if foreign:
        raise OutputError(
            f"{output} holds {foreign[0]}, which spmconvert did not write and does not replace, with --force, too; "
            "move it away or choose another output with -o"
        )
    if not force:
        raise OutputError(f"{output} exists already; replace it with --force or choose another output with -o")


def foreign_files(directory: Path) -> list[str]:
    """Files in a directory that no run of this tool wrote, by their paths inside of it, sorted.

    Those of a checkpoint that it wrote are listed in its checksums, beside the files that may change afterwards. Where
    there is no list that can be read every file is somebody else's.
    """
    try:
        written = {*read_checksums(directory), *UNLISTED_FILES}
    except CheckpointError:
        written = set()
    files = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in files if (name := path.relative_to(directory).as_posix()) not in written)


def partial_directory(output: Path) -> Path:
    """The working directory of an output while it is not finished."""
    return output.parent / f".{output.name}.partial"


def finish_commit(output: Path) -> bool:
    """Bring a run to its end that was killed in its last steps; returns whether there was one.

    A complete result is renamed into place, what it replaced is removed, and the working directory after it. A run that
    had not begun to rename goes on as an unfinished one.
    """
    output = Path(os.path.realpath(output))
    partial = partial_directory(output)
    note = partial / COMMIT_FILE
    if not note.is_file():
        return False
    aside = _put_aside(note, output)
    final = partial / FINAL_DIRECTORY
    if final.exists():
        if output.exists():
            note.unlink()
            return False
        final.rename(output)
        sync(output.parent)
    # the output is there: nothing that happens to the rest can be an error of this run
    if aside is not None:
        shutil.rmtree(output.parent / aside, ignore_errors=True)
    with suppress(OSError):
        remove_working_directory(partial)
    return True


def _put_aside(note: Path, output: Path) -> str | None:
    """Name of the old output that a run has put aside, or None where there was none.

    Raises:
        OutputError: when the note is not one of this tool.
    """
    try:
        aside = parse_json(note.read_text(encoding="utf-8"))["aside"]
    except (ValueError, KeyError, TypeError):
        aside = ""
    # the name is removed with all that is below it
    if aside is not None and not re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}\.old", str(aside)):
        raise OutputError(f"{note} is damaged; move {note.parent} away, after a look at what is in it")
    return None if aside is None else str(aside)


def is_working_directory(partial: Path) -> bool:
    """Whether there is an unfinished run.

    Raises:
        OutputError: when something else is there.
    """
    if not os.path.lexists(partial):
        return False
    if (partial / RUN_FILE).is_file():
        return True
    # a run may have been killed before its mark was whole
    if partial.is_dir() and all(re.fullmatch(r"\.run\.\d+\.json", path.name) for path in partial.iterdir()):
        return False
    raise OutputError(f"{partial} is not a working directory of spmconvert; move it away or choose another output with -o")


def remove_working_directory(partial: Path) -> None:
    """Remove one with its mark last, so that what a kill leaves of it is still known as one."""
    for path in partial.iterdir():
        if path.name not in (RUN_FILE, COMMIT_FILE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in (COMMIT_FILE, RUN_FILE):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()
