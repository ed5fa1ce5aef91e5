"""Where caches are kept: one root for all of them, one folder a kind.

Everything in a cache can be made again and is named by the hash of what it was made from, so any of it may be deleted at
any time, and nothing in it grows stale.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from spmconvert.errors import NotWritableError
from spmconvert.system.files import save_whole, write_errors


def cache_directory(kind: str) -> Path:
    """The folder of a kind, in ``SPMCONVERT_CACHE`` or else in ``spmconvert`` in the user's cache directory."""
    if chosen := os.environ.get("SPMCONVERT_CACHE"):
        return Path(chosen) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spmconvert" / kind


def check_cache(kind: str) -> None:
    """Make the folder of a kind and see that files can be written there, before anything costly is made for it.

    Raises:
        NotWritableError: when they cannot.
    """
    directory = cache_directory(kind)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise NotWritableError(
            f"the cache {directory} cannot be written ({error.strerror}); set SPMCONVERT_CACHE to a directory that can"
        ) from None


def keep(file: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file of a cache by one rename; its folder is made where it is not there.

    Args:
        file: the place.
        content: text, or what writes to the path that it is given.

    Raises:
        NotWritableError: when it cannot be written.
        SpaceError: when there is no room.
    """

    def save(path: Path) -> object:
        return path.write_text(content, encoding="utf-8") if isinstance(content, str) else content(path)

    remedy = "set SPMCONVERT_CACHE to a directory with room"
    with write_errors(file.parent, remedy, f"run the command again, or {remedy}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_whole(file, save)
