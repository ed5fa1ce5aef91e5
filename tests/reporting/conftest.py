"""One converted model and one full report of it, shared by the tests of this folder."""

import random

import pytest

from spmconvert.conversion import convert
from spmconvert.reporting.report import report

QUICK = {"fit.iterations": 3, "calibration.rows": 16, "calibration.tokens": 32}


@pytest.fixture(scope="session")
def other_text(tmp_path_factory):
    """A text that nothing was fitted on."""
    generator = random.Random(7)
    lines = ["".join(generator.choices("bcdfgjkmpqvwxyz ", k=90)) for _ in range(120)]
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def converted(checkpoints, text, tmp_path_factory):
    """The MLPs of the tiny GPT-2, fitted on the calibration text."""
    output = tmp_path_factory.mktemp("converted") / "gpt2-spm"
    convert(checkpoints["gpt2"], output, calib=text, **QUICK)
    return output


@pytest.fixture(scope="session")
def quick_report(converted, text, other_text):
    """A report with every part."""
    return report(converted, data=other_text, other_data=text, baselines=True, rows=6, seconds=0.01)
