"""Ctrl-C: the process ends at once until there is work, and is told of it by KeyboardInterrupt from then on.

While modules are imported an exception is no way to end: it may come up inside of somebody else's ``except``, or as a
traceback from before the command line is there to say a line about it. This module imports next to nothing, since it comes
before all others.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

LINE = "interrupted before anything was kept; start again"
EXIT_CODE = 130


def end_at_once() -> None:
    """Let Ctrl-C end the process with one line; where the process ignores it, as in a shell's background, it still does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def at_work() -> Iterator[None]:
    """While this lasts Ctrl-C is a KeyboardInterrupt, whoever is there to say what was kept."""
    ends = signal.getsignal(signal.SIGINT) is _end
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{LINE}\n".encode())
    os._exit(EXIT_CODE)
