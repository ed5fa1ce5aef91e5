"""Commands without a file: what a causal model writes, or prose of the Python installation, stands in for a text."""

import json
import re
import shutil

import pytest
import torch

from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.cli import outcome
from spmconvert.commands import report as reporting
from spmconvert.data.library import library_text
from spmconvert.data.tokens import TOKENIZER_FILES, TOKENIZER_PARTS
from spmconvert.data.written import written_file
from spmconvert.errors import CalibrationError
from tests.support import assert_refused


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr("spmconvert.data.written.ROWS", 24)


FEW = ["--rank", "2", "--refine", "0", "--set", "calibration.rows=8", "--set", "fit.iterations=2"]


def test_three_commands_without_a_file(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", checkpoints["gpt2"], *FEW, "--measure")
    assert code == 0, err
    for figure in (r"parameters +−\d+%", r"speed +\d\.\d+×", r"quality +[\d.]+ → [\d.]+"):
        assert re.search(figure, out), out
    assert out.index("quality") < out.index("next: spmconvert finetune gpt2-spm, or load it")
    assert "calibrated on what the model writes itself; a text like what the model is used for is far better" in err
    assert "held out, on 1 rows" in out
    recorded = json.loads((tmp_path / "gpt2-spm" / "spm.json").read_text())["recipe"]["calibration"]["file"]
    assert recorded == str(written_file("calibration", open_checkpoint(str(checkpoints["gpt2"])).sha256()))
    code, out, err = run("finetune", "--steps", "2", "--batch-size", "2", "--measure", "--json")
    assert code == 0, err
    assert [figure["label"] for figure in json.loads(out)["outcome"]] == ["parameters", "speed", "quality"]
    assert (
        "trained on prose that comes with spmconvert, docstrings of Python, and what the model writes itself; a text like"
        in err
    )
    assert (tmp_path / "gpt2-spm-ft").is_dir()
    code, out, err = run("report", "--rows", "2", "--seconds", "0", "--json")
    assert code == 0, err
    assert json.loads(out)["model"]["name"] == "gpt2-spm-ft"
    (quality,) = json.loads(out)["quality"]
    assert quality["text"] == "prose that comes with spmconvert, and docstrings of Python"
    assert quality["rows"] == 2
    code, out, err = run("report", "--rows", "2", "--seconds", "0", "--json", "--data", "none")
    assert json.loads(out)["quality"] == []


def test_a_dry_run_knows_the_text_that_a_run_took(run, checkpoints, tmp_path):
    code, out, _ = run("convert", checkpoints["bert"], "--rank", "2", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["calibration"]["file"] == str(library_text("calibration"))
    written = written_file("calibration", open_checkpoint(str(checkpoints["llama"])).sha256())
    written.unlink(missing_ok=True)
    _, out, _ = run("convert", checkpoints["llama"], "--rank", "2", "--dry-run", "--json")
    assert json.loads(out)["recipe"]["calibration"]["file"] == str(library_text("calibration"))
    assert not written.exists(), "a dry run writes nothing"
    run("convert", checkpoints["llama"], "-o", tmp_path / "o", *FEW)
    _, out, _ = run("convert", checkpoints["llama"], "--rank", "2", "--dry-run", "--json")
    assert json.loads(out)["recipe"]["calibration"]["file"] == str(written)
    code, out, _ = run("convert", checkpoints["gpt2"], "--rank", "2", "--dry-run", "--json", "--calib", "none")
    assert json.loads(out)["recipe"]["calibration"]["file"] is None


def test_a_recipe_may_ask_for_it(run, checkpoints, tmp_path):
    (tmp_path / "recipe.toml").write_text('[calibration]\nfile = "auto"\n[design]\nrank = 2\n')
    _, out, _ = run("convert", checkpoints["gpt2"], "--recipe", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert json.loads(out)["recipe"]["calibration"]["file"] == str(library_text("calibration"))


@pytest.fixture
def wordless(checkpoints, tmp_path):
    """A checkpoint without a tokenizer."""
    directory = tmp_path / "wordless"
    shutil.copytree(checkpoints["gpt2"], directory)
    for pattern in (*TOKENIZER_FILES, *TOKENIZER_PARTS):
        for file in directory.glob(pattern):
            file.unlink()
    return directory


def test_models_without_a_tokenizer_read_no_text(run, wordless, tmp_path):
    code, out, _ = run("convert", wordless, "-o", tmp_path / "o", "--rank", "2")
    assert code == 0
    assert "no data was used" in out
    assert_refused(run("finetune", tmp_path / "o"), CalibrationError, "neither a tokenizer", ".safetensors")
    code, out, _ = run("report", tmp_path / "o", "--seconds", "0", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["quality"] == []
    assert any("no text is given" in missing["reason"] for missing in report["not_measured"])


def test_models_that_do_not_fit_twice_are_not_measured(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(outcome, "free_memory", lambda _: 1000)
    code, out, err = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", *FEW, "--measure")
    assert code == 0
    assert "the whole model is not measured: both models take about" in err
    assert "1.0 kB is free" in err
    assert "next:" in out
    code, out, _ = run("convert", checkpoints["gpt2"], "-o", tmp_path / "p", *FEW, "--measure", "--json")
    assert json.loads(out)["outcome"] == []


@pytest.mark.parametrize(
    "error", [CalibrationError("no rows"), torch.OutOfMemoryError("no memory\nTried to allocate 2 GiB")]
)
def test_what_cannot_be_measured_does_not_fail_a_conversion(run, checkpoints, tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(reporting, "report", refuse)
    code, _, err = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", *FEW, "--measure")
    assert code == 0
    assert f"the whole model is not measured: {str(error).splitlines()[0]}\n" in err
