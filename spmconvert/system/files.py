"""Files that are there completely or not at all: written under another name beside the place, then renamed.

Every file that a later run may read is written here: finished layers, caches, reports. A file that has to survive a power
failure (``durable``) is also flushed to the disk, with the directory that holds its name.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spmconvert.errors import NotWritableError, SpaceError


@contextmanager
def write_errors(place: Path, elsewhere: str, again: str) -> Iterator[None]:
    """Turn the system's refusals to write into errors with a remedy.

    Args:
        place: that is written, for the error.
        elsewhere: how to have another place.
        again: what to do once there is room.

    Raises:
        SpaceError: when there is none.
        NotWritableError: for any other reason.
    """
    try:
        yield
    except OSError as error:
        # numpy notes what it could not write in words alone
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "written" in str(error)):
            raise SpaceError(f"no space left while writing {place}; free some, then {again}") from error
        raise NotWritableError(f"{place} cannot be written ({error.strerror or error}); {elsewhere}") from error


def write_whole(file: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write a file, or replace it, by one rename.

    Args:
        file: the place; its directory exists.
        content: text is written as UTF-8.
        durable: also when the machine stops right after.

    Raises:
        OSError: as the system does.
    """
    data = content.encode() if isinstance(content, str) else content
    save_whole(file, lambda temporary: temporary.write_bytes(data), durable=durable)


def save_whole(file: Path, save: Callable[[Path], object], *, durable: bool = False) -> None:
    """The same for a library that writes to a path.

    Args:
        file: the place; its directory exists.
        save: writes to the path that it is given, which has the suffix of ``file``.
        durable: also when the machine stops right after.

    Raises:
        OSError: as the system does.
    """
    # the process in the name: several may write the same file at once, and each renames a whole one
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        save(temporary)
        if durable:
            sync(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(file.parent)


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: as the system does.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
