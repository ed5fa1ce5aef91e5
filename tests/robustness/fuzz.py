"""Everything that reads a file, given what nobody wrote: only this project's own errors come out.

    python -m tests.robustness.fuzz --count 1000000 header recipe

Structures are changed and not bytes, since a parser refuses nearly all changed bytes before a line of ours sees them:
values are replaced, taken out, doubled, wrapped and swapped with others, anywhere inside of a file that was good. Prints a
line of JSON for each reader, with how many inputs it was given, how many it refused, and every place where another
exception began.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from spmconvert.errors import SpmconvertError
from tests.robustness.readers import READERS, Reader, make_readers

# a reader that takes longer on one input hangs
LONGEST = 5.0
KEYS = ["in", "out", "terms", "kind", "name", "path", "file", "..", "a/b", "", "\x1b[2J", "layers", "0"]
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, -0.0, float("inf"), float("nan")]
)
TEXTS = st.sampled_from(
    ["", "x", "..", "/etc/passwd", "\ud800", "\x00", "float32", "F32", "general", "mlp", "re:(", "9" * 30]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.integers(-(10**6), 10**6))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=6,
)
KINDS = ("replace", "replace", "replace", "remove", "add", "double", "swap", "wrap", "nudge")


@st.composite
def changed(draw: Callable[[Any], Any], good: Any) -> Any:
    """A structure with one to three changes somewhere inside."""
    content = [deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        places = _places(content)
        _change(draw, content, *draw(st.sampled_from(places)))
    return content[0]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it."""
    found, waiting = [], [content]
    while waiting:
        place = waiting.pop()
        items = place.items() if isinstance(place, dict) else enumerate(place)
        for key, value in items:
            found.append((place, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


def _change(draw: Callable[[Any], Any], root: list[Any], place: Any, key: Any) -> None:
    kind, value = draw(st.sampled_from(KINDS)), place[key]
    if kind == "remove" and place is not root:
        del place[key]
    elif kind == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(KEYS))] = draw(VALUES)
    elif kind == "double" and isinstance(place, list) and place is not root:
        place.insert(key, deepcopy(value))
    elif kind == "swap":
        other, name = draw(st.sampled_from(_places(root)))
        place[key] = deepcopy(other[name])
    elif kind == "wrap":
        place[key] = draw(st.sampled_from([[value], {"x": value}]))
    elif kind == "nudge" and isinstance(value, int | float):
        place[key] = draw(st.sampled_from([value + 1, value - 1, -value, value * 2**40]))
    else:
        place[key] = draw(VALUES)


def site(error: BaseException) -> str:
    """Where an exception began, as far as the package is concerned."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/spmconvert/" in frame.filename]
    last = frames[-1] if frames else None
    where = "outside" if last is None else f"{last.filename.rpartition('/spmconvert/')[2]}:{last.lineno}"
    return f"{type(error).__name__} at {where}"


def attempt(reader: Reader, content: Any) -> str | None:
    """Have a reader read a structure: None where it did or refused it, otherwise what else happened."""
    began = time.monotonic()
    try:
        reader.write(content)
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError, RecursionError, RuntimeError):
        # such a structure cannot be written down
        return "unwritable"
    try:
        reader.read()
    except SpmconvertError as error:
        return "refused" if str(error) else "refused without a word"
    except Exception as error:
        return site(error)
    return None if time.monotonic() - began < LONGEST else "hangs"


def fuzz(reader: Reader, count: int) -> dict[str, Any]:
    """Give a reader so many inputs; returns how many of each kind there were."""
    seen: Counter[str] = Counter()
    examples: dict[str, str] = {}

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(reader.good))
    def give(content: Any) -> None:
        found = attempt(reader, content) or "read"
        seen[found] += 1
        if found not in ("read", "refused", "unwritable"):
            examples.setdefault(found, repr(content)[:2000])

    give()
    crashes = {place: number for place, number in seen.items() if place in examples}
    return {
        "reader": reader.name,
        "inputs": seen.total() - seen["unwritable"],
        "refused": seen["refused"],
        "crashes": crashes,
        "examples": examples,
    }


def main() -> None:
    """Fuzz the readers that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    crashed = False
    with tempfile.TemporaryDirectory() as directory:
        readers = make_readers(Path(directory))
        for name in options.readers:
            began = time.monotonic()
            found = fuzz(readers[name], options.count)
            crashed |= bool(found["crashes"])
            print(json.dumps({**found, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    sys.exit(crashed)


if __name__ == "__main__":
    main()
