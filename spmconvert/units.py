"""Numbers as people read and write them: bytes, counts, durations and measured values, the same everywhere."""

import re
from contextlib import suppress

from pydantic import ByteSize, TypeAdapter, ValidationError

from spmconvert.errors import OptionError


def size(number: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def measured_size(number: float | None) -> str:
    """The same; nothing becomes a dash."""
    return "–" if number is None else size(number)


def parse_size(text: str) -> int:
    """Bytes from a number with a unit, as ``size`` writes it: 40MB, 1.5 GB, 300000.

    Raises:
        OptionError: when it is not such a number.
    """
    # pydantic would also take binary units, bits, and letters that mean either
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmgt]?b)?\s*", text, re.IGNORECASE):
        with suppress(ValidationError):
            return TypeAdapter(ByteSize).validate_python(text)
    raise OptionError(f"size {text!r} is not understood; write for example 40MB, 1.5GB or 300000")


def count(number: float) -> str:
    """A large number with a decimal suffix."""
    for suffix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.0f}{suffix}" if suffix == "" else f"{number:.2f}{suffix}"
        number /= 1000
    return f"{number:.2f}T"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def milliseconds(number: float) -> str:
    """A latency with three significant digits, without its unit."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def measured(number: float | None, unit: str) -> str:
    """A measured value with its unit; a share becomes a percentage, nothing becomes a dash."""
    if number is None:
        return "–"
    if unit == "share":
        return f"{number:.1%}"
    digits = f"{number:.4g}" if abs(number) < 1000 else f"{number:,.0f}"
    return f"{digits} {unit}".strip()
