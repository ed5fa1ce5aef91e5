"""Where caches are kept: one root for all of them, one folder a kind.

Everything in a cache can be made again and is named by the hash of what it was made from, so any of it may be deleted at
any time, and nothing in it grows stale.
"""

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """The folder of a kind, in ``SPMCONVERT_CACHE`` or else in ``spmconvert`` in the user's cache directory."""
    if chosen := os.environ.get("SPMCONVERT_CACHE"):
        return Path(chosen) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spmconvert" / kind
