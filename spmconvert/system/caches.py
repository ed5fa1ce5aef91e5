"""Where caches are kept: one root for all of them, one folder a kind.

Everything in a cache can be made again and is named by the hash of what it was made from, so any of it may be deleted at
any time, and nothing in it grows stale.
"""

import os
import tempfile
from pathlib import Path

from spmconvert.errors import NotWritableError


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
