"""Sizes are read back as they are written, and nothing else is taken for one."""

import pytest

from spmconvert.errors import OptionError
from spmconvert.units import parse_size, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40MB", 40_000_000),
        ("1.5 GB", 1_500_000_000),
        ("300000", 300_000),
        ("7 kb", 7_000),
        (" 2tB ", 2 * 10**12),
        ("12 B", 12),
        ("0", 0),
        ("1.5", 1),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("number", [0, 999, 1_000, 12_300, 4_500_000, 6_700_000_000, 8 * 10**12])
def test_what_is_written_is_read_back(number):
    assert parse_size(size(number)) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "-5",
        "40M",
        "40k",
        "1KiB",
        "8bits",
        "1bit",
        "3PB",
        "1e3",
        ".5MB",
        "5.MB",
        "1..2",
        "nan",
        "9" * 400 + "GB",
        "9" * 5000,
    ],
)
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(OptionError, match="not understood") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)
