"""The demo on the real encoder where its extra is installed, with as few steps as show that the parts fit together."""

import sys

import pytest

from spmconvert import errors
from spmconvert.cli import app as cli
from spmconvert.commands import demo as demonstration
from spmconvert.reporting.schema import read_report


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The texts of the demo, written once."""
    return demonstration.write_texts(tmp_path_factory.mktemp("texts"))


def test_texts_share_no_paragraph(texts):
    assert list(texts) == ["calibration", "evaluation", "training", "code"]
    contents = {name: file.read_text().splitlines() for name, file in texts.items()}
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


def test_demo_ends_with_a_report_of_unseen_text(texts, tmp_path, monkeypatch):
    for file in texts.values():
        # a few documents of each
        file.write_text("\n".join(file.read_text().splitlines()[:24]))
    monkeypatch.setattr(demonstration, "write_texts", lambda _: texts)
    changes = {"layers": "0", "fit.iterations": 2, "calibration.rows": 16, "calibration.tokens": 32}
    monkeypatch.setattr(demonstration, "CONVERSION", changes)
    monkeypatch.setattr(demonstration, "SECONDS", 0)
    steps = []
    page = demonstration.demo(tmp_path / "demo", steps=1, step=steps.append)
    assert page == tmp_path / "demo" / "minilm-spm-ft" / "report.html"
    found = read_report(page.with_suffix(".json"))
    assert [(text.text, text.domain) for text in found.quality] == [("evaluation.txt", "first"), ("code.txt", "other")]
    assert found.model.finetuned
    assert found.training[0].steps == 1
    assert [candidate.key for candidate in found.candidates] == ["dense", "spm", "svd", "2:4"]
    assert steps[-1].startswith("measuring")
