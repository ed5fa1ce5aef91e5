"""report, verify and export as a user meets them: on a converted, unfinished, damaged or dense model, and on none."""

import json
import shutil
import sys

import pytest

from spmconvert import errors
from spmconvert.checkpoint.places import STATE_FILE
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.commands import verify as verification
from spmconvert.commands.convert import convert
from spmconvert.fit.progress import Silent
from tests.support import assert_refused

FAST = ("--seconds", "0")


@pytest.fixture
def place(gpt2_spm, tmp_path, monkeypatch):
    """A working directory with one converted model."""
    shutil.copytree(gpt2_spm, tmp_path / "gpt2-spm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_an_argument_the_only_one_is_taken(run, place, text):
    code, out, err = run("report", "--data", text, *FAST)
    assert code == 0
    for words in ("gpt2-spm", "transformer.h.0.mlp.c_fc", "perplexity", "parameters, whole model", "Not measured: time"):
        assert words in out
    assert "report.html" in err
    assert sorted(path.name for path in (place / "gpt2-spm").glob("report.*")) == ["report.html", "report.json"]
    assert "spmconvert report: begin" in (place / "gpt2-spm" / "README.md").read_text()


def test_json_is_the_report(run, place):
    code, out, _ = run("report", "gpt2-spm", "--json", "-o", "out", *FAST)
    assert code == 0
    assert json.loads(out) == json.loads((place / "out" / "report.json").read_text())
    assert not (place / "gpt2-spm" / "report.json").exists()


def test_two_models_stand_side_by_side(run, place):
    shutil.copytree("gpt2-spm", "other-spm")
    code, out, _ = run("report", "gpt2-spm", "other-spm", *FAST)
    assert code == 0
    assert out.splitlines()[0].split() == ["gpt2-spm", "other-spm"]
    assert "parameters, whole model" in out
    assert len(json.loads((place / "spm-comparison" / "report.json").read_text())) == 2
    assert_refused(run("report", *FAST), errors.OptionError, "gpt2-spm, other-spm")


def test_an_unfinished_conversion_is_told_from_a_missing_one(run, place, checkpoints):
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoints["gpt2"], "half-spm", progress=InterruptAfterTwo(), **{"fit.iterations": 2})
    for name in ("half-spm", ".half-spm.partial"):
        code, out, _ = run("report", name)
        assert code == 0
        assert "half-spm is not finished: 2 layers are fitted" in out
        assert "--resume" in out
        assert "transformer.h.0.mlp.c_fc" in out
    code, out, _ = run("report", "half-spm", "--json")
    assert len(json.loads(out)["layers"]) == 2
    with OutputDirectory(place / "tuned", fingerprint="f", force=False, resume=False, needed_bytes=1) as target:
        target.store_file(STATE_FILE, b"state")
    assert "a finetune has kept its state" in run("report", "tuned")[1]
    assert_refused(run("report", "nothing"), errors.ModelNotFoundError, "nothing")


class InterruptAfterTwo(Silent):
    """A listener that interrupts the conversion when two layers are finished."""

    def planned(self, plan):
        pass

    def calibrating(self, done, total):
        pass

    def fitted(self, record, done, total):
        if done == 2:
            raise KeyboardInterrupt

    def refined(self, name, done, total):
        pass

    def writing(self, total_bytes):
        pass


def test_a_damaged_model_is_one_line(run, place):
    file = place / "gpt2-spm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    assert_refused(run("report", *FAST), errors.CorruptCheckpointError, "model.safetensors", "damaged")
    code, out, err = run("verify")
    assert code == errors.VerificationError.exit_code
    assert "FAILED" in out
    assert "failed 1 of 1 checks: files" in err


def test_a_dense_model_is_one_line(run, checkpoints, tmp_path, monkeypatch):
    for command in ("report", "verify", "export"):
        result = run(command, checkpoints["gpt2"])
        if command == "verify":
            assert result[0] == errors.VerificationError.exit_code
        else:
            assert_refused(result, errors.CheckpointError, "is not a converted checkpoint", "spmconvert convert")
    monkeypatch.chdir(tmp_path)
    assert_refused(run("report"), errors.OptionError, "no converted checkpoint")


def test_wrong_options_of_report(run, place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(run("report", "--tasks", "hellaswag"), errors.OptionError, "spmconvert[eval]")
    assert_refused(run("report", "--rows", "0"), errors.OptionError, "rows is 0")
    assert_refused(run("report", "--data", tmp_path / "none.txt", *FAST), errors.CalibrationError, "none.txt")
    assert_refused(run("report", "--device", "cuda:99", *FAST), errors.BackendError, "cuda:99")


def test_verify_prints_a_line_a_check(run, place, monkeypatch):
    found = []
    whole = verification.verify

    def once(*arguments, **options):
        # the checks start a process, and both forms show the same ones
        found.extend(found or whole(*arguments, **options))
        return found[:7]

    monkeypatch.setattr(verification, "verify", once)
    code, out, _ = run("verify")
    assert code == 0
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines == ["ok", "ok", "ok", "ok", "ok", "ok", "skipped"]
    assert [check["outcome"] for check in json.loads(run("verify", "--json")[1])] == lines


def test_export_says_how_well_it_matches(run, place):
    code, out, _ = run("export", "gpt2-spm", "--format", "dense", "-o", "dense")
    assert code == 0
    assert "4 layers are dense again" in out
    assert "0.0001 is allowed" in out
    assert (place / "dense" / "model.safetensors").exists()
    assert_refused(run("export", "gpt2-spm", "--format", "gguf"), errors.OptionError, "gguf", "dense")
    code, out, _ = run("export", "gpt2-spm", "-o", "dense", "--force", "--json")
    assert json.loads(out)["layers"] == 4
