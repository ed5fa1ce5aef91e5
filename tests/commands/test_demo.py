"""The demo on the real encoder where its extra is installed, with as few steps as show that the parts fit together."""

import sys

import pytest

from spmconvert import errors
from spmconvert.cli import app as cli
from spmconvert.commands import demo as demonstration
from spmconvert.reporting.schema import read_report


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demonstration, "MODEL_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(sys, "argv", ["spmconvert", "demo", "-o", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == errors.OptionError.exit_code
    assert "spmconvert[demo]" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_ends_with_a_report_of_unseen_text(tmp_path, monkeypatch):
    changes = {"layers": "0", "rank": 48, "fit.iterations": 2, "calibration.rows": 16, "calibration.tokens": 32}
    monkeypatch.setattr(demonstration, "CONVERSION", changes)
    monkeypatch.setattr(demonstration, "SECONDS", 0)
    steps = []
    page = demonstration.demo(tmp_path / "demo", steps=1, step=steps.append)
    assert page == tmp_path / "demo" / "minilm-spm-ft" / "report.html"
    found = read_report(page.with_suffix(".json"))
    assert [text.domain for text in found.quality] == ["first", "other"]
    assert found.quality[0].text == "prose that comes with spmconvert, and docstrings of Python"
    assert found.quality[1].text.startswith("code-")
    assert found.model.finetuned
    assert found.training[0].steps == 1
    assert [candidate.key for candidate in found.candidates] == [
        "dense",
        "spm",
        "svd",
        "2:4",
        "int8-weight-only",
        "int8-dynamic",
    ]
    assert steps[-1].startswith("measuring")
