"""The demo on the real encoder where its extra is installed, with as few steps as show that the parts fit together."""

import importlib.util
import sys

import pytest

from spmconvert import cli, demonstration, errors
from spmconvert.reporting.schema import read_report


def test_texts_are_the_same_every_time_and_share_no_paragraph(tmp_path):
    files = demonstration.write_texts(tmp_path / "a")
    again = demonstration.write_texts(tmp_path / "b")
    assert list(files) == ["calibration", "evaluation", "training", "code"]
    contents = {name: file.read_text().splitlines() for name, file in files.items()}
    assert contents == {name: file.read_text().splitlines() for name, file in again.items()}
    for one, other in (("calibration", "evaluation"), ("calibration", "training"), ("training", "evaluation")):
        assert not set(contents[one]) & set(contents[other])
    assert min(map(len, contents.values())) > 200


def test_a_library_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(errors.CalibrationError, match="no sources with docstrings"):
        demonstration.write_texts(tmp_path / "text")


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demonstration, "MODEL_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(sys, "argv", ["spmconvert", "demo", "-o", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == errors.OptionError.exit_code
    assert "spmconvert[demo]" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.skipif(
    importlib.util.find_spec(demonstration.MODEL_PACKAGE) is None, reason="the extra demo with its model is not installed"
)
def test_demo_ends_with_a_report_of_unseen_text(tmp_path, monkeypatch):
    changes = {"layers": "0", "fit.iterations": 2, "calibration.rows": 16, "calibration.tokens": 32}
    monkeypatch.setattr(demonstration, "CONVERSION", changes)
    monkeypatch.setattr(demonstration, "SECONDS", 0)
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    steps = []
    page = demonstration.demo(tmp_path / "demo", steps=1, step=steps.append)
    assert page == tmp_path / "demo" / "minilm-spm-ft" / "report.html"
    found = read_report(page.with_suffix(".json"))
    assert [(text.text, text.domain) for text in found.quality] == [("evaluation.txt", "first"), ("code.txt", "other")]
    assert found.model.finetuned
    assert found.training[0].steps == 1
    assert [candidate.key for candidate in found.candidates] == ["dense", "spm", "svd", "2:4"]
    assert steps[-1].startswith("measuring")
