"""A finetune through the Python API and the command: it helps, it resumes, it keeps what it should, and it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertForSequenceClassification, BertForTokenClassification

import spmconvert
from spmconvert.commands.finetune import finetune
from spmconvert.distill.length import FEW_ROWS, ROWS
from spmconvert.errors import CalibrationError, CheckpointError, ModelNotFoundError, OptionError, OutputError, RecipeError
from tests.conftest import bert_config
from tests.support import SHORT, assert_refused, files_of, raw_tensors


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama-bf16"])
def test_finetune_lowers_the_held_out_loss_and_changes_spm_layers_only(converted, text, tmp_path, name):
    result = finetune(
        converted[name], tmp_path / "o", data=text, train="spm", **{**SHORT, "steps": 40, "learning_rate": 1e-3}
    )
    assert result.best_loss < 0.9 * result.start_loss
    assert result.tokens > 0
    assert result.history[0]["step"] == 0
    before, after = raw_tensors(converted[name]), raw_tensors(tmp_path / "o")
    layers = {
        layer["name"].removeprefix("transformer.")
        for layer in json.loads((tmp_path / "o" / "spm.json").read_text())["layers"]
    }
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert changed
    assert all(any(layer in key for layer in layers) for key in changed)
    assert all(before[key][0] == after[key][0] for key in before), "dtypes stay"
    assert spmconvert.load(tmp_path / "o")
    run_record = json.loads((tmp_path / "o" / "spm.json").read_text())["finetune"][0]
    assert run_record["best_loss"] == result.best_loss
    assert "distilled against its source" in (tmp_path / "o" / "README.md").read_text()


def test_reported_loss_is_the_loss_of_what_was_written(converted, checkpoints, text, tmp_path):
    from spmconvert.data.training import load_training_data
    from spmconvert.distill.loss import Distillation
    from spmconvert.recipe.recipe import Training

    result = finetune(converted["gpt2"], tmp_path / "o", data=text, **SHORT)
    student, teacher = spmconvert.load(tmp_path / "o").eval(), spmconvert.load(checkpoints["gpt2"]).eval()
    training = Training(**SHORT)
    rows = load_training_data(str(text), tmp_path / "o", student.config, training).held_out
    with torch.no_grad():
        loss = Distillation(student, teacher, "logits", training).loss(
            rows.batch(range(SHORT["evaluation_rows"]), student, 0)
        )
    assert result.best_loss == pytest.approx(loss.total.item() / loss.positions, rel=1e-4)


@pytest.mark.parametrize("trained", ["norms", "all"])
def test_what_is_trained(converted, text, tmp_path, trained):
    finetune(converted["gpt2"], tmp_path / "o", data=text, train=trained, **SHORT)
    before, after = raw_tensors(converted["gpt2"]), raw_tensors(tmp_path / "o")
    changed = {key for key in before if before[key] != after[key]}
    assert any("ln_1" in key for key in changed)
    assert any("wte" in key for key in changed) == (trained == "all")


@pytest.mark.parametrize(("name", "scope", "rows"), [("gpt2", "spm", FEW_ROWS), ("bert", "all", ROWS)])
def test_what_is_trained_where_nobody_says(converted, text, tmp_path, name, scope, rows):
    options = {key: value for key, value in SHORT.items() if key != "batch_size"}
    finetune(converted[name], tmp_path / "o", data=text, **options)
    [record] = json.loads((tmp_path / "o" / "spm.json").read_text())["finetune"]
    assert record["recipe"]["train"] == scope
    assert record["recipe"]["batch_size"] == rows
    before, after = raw_tensors(converted[name]), raw_tensors(tmp_path / "o")
    assert any("embeddings" in key or "wte" in key for key in before if before[key] != after[key]) == (scope == "all")


def test_accumulation_changes_nothing_but_memory(converted, text, tmp_path):
    losses = [
        finetune(converted["gpt2"], tmp_path / str(parts), data=text, accumulation=parts, **SHORT).best_loss
        for parts in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_interrupted_run_resumes_to_the_same_bytes(converted, text, tmp_path):
    finetune(converted["gpt2"], tmp_path / "whole", data=text, **SHORT)

    def interrupt(record):
        if record.get("step") == 10 and "loss" in record:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(converted["gpt2"], tmp_path / "cut", data=text, report=interrupt, **SHORT)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(OutputError, match="other settings"):
        finetune(converted["gpt2"], tmp_path / "cut", data=text, resume=True, **{**SHORT, "steps": 13})
    steps = []
    finetune(converted["gpt2"], tmp_path / "cut", data=text, resume=True, report=lambda r: steps.append(r["step"]), **SHORT)
    assert steps[0] == 9, "goes on after the checkpoint at step 8"
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")


def test_killed_run_resumes(converted, text, tmp_path):
    options = {"data": str(text), **SHORT, "steps": 60}
    places = f"{str(converted['gpt2'])!r}, {str(tmp_path / 'o')!r}"
    code = f"from spmconvert.commands.finetune import finetune; finetune({places}, **{options!r})"
    before = files_of(converted["gpt2"])
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / ".o.partial" / "state.bin").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "o").exists()
    assert files_of(converted["gpt2"]) == before
    result = finetune(converted["gpt2"], tmp_path / "o", resume=True, **options)
    assert result.steps == 60


def test_diverging_run_keeps_the_last_good_state(converted, text, tmp_path):
    result = finetune(converted["gpt2"], tmp_path / "o", data=text, learning_rate=1e4, **SHORT)
    assert result.stopped
    assert math.isfinite(result.best_loss)
    assert result.best_loss <= result.start_loss
    assert all(p.isfinite().all() for p in spmconvert.load(tmp_path / "o").parameters())


def test_teacher_must_be_the_source(converted, checkpoints, text, tmp_path):
    with pytest.raises(CheckpointError, match="--teacher"):
        finetune(converted["gpt2"], tmp_path / "o", data=text, teacher=str(checkpoints["llama"]), **SHORT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps 0 is below 1"),
        ({"learning_rate": 0}, "--lr 0 is not above 0"),
        ({"held_out": 1.0}, "held_out"),
        ({"train": "some"}, "--train some is unknown; choose among spm, norms, all"),
        ({"accumulation": 9}, "accumulation 9 is above"),
        ({"temperature": -1.0}, "temperature"),
    ],
    ids=str,
)
def test_bad_numbers(converted, text, tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, **changes})


def test_command(run, converted, text, tmp_path, monkeypatch):
    arguments = ("--data", text, "--steps", 4, "--batch-size", 2, "--block-size", 32)
    code, out, err = run("finetune", converted["gpt2"], "-o", tmp_path / "o", *arguments)
    assert code == 0, err
    assert "KL to the source's words, held out:" in out
    assert (tmp_path / "o" / "config.json").exists()
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("finetune", "-o", tmp_path / "p", "--json", *arguments)
    assert code == 0, "the only converted checkpoint in the working directory"
    assert json.loads(out)["steps"] == 4


def test_command_refuses(run, converted, checkpoints, text, tmp_path, monkeypatch):
    assert_refused(
        run("finetune", converted["gpt2"], "--data", text, "--train", "x"), RecipeError, "choose among spm, norms, all"
    )
    assert_refused(run("finetune", tmp_path / "none", "--data", text), ModelNotFoundError, "no directory")
    assert_refused(run("finetune", checkpoints["gpt2"], "--data", text), CheckpointError, "not a converted checkpoint")
    assert_refused(run("finetune", converted["gpt2"], "--data", tmp_path / "none.txt"), CalibrationError, "cannot be read")
    monkeypatch.chdir(converted["bert"].parent)
    assert_refused(run("finetune", "--data", text), OptionError, "bert, gpt2")
    monkeypatch.chdir(tmp_path)
    assert_refused(run("finetune", "--data", text), OptionError, "no converted checkpoint")


def test_paths_that_were_given_relative_are_found_from_elsewhere(checkpoints, text, tmp_path, monkeypatch):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "model")
    shutil.copy(text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    spmconvert.convert("model", "out [v2] dir", rank=2, calib="text.txt", **{"fit.iterations": 2, "calibration.rows": 12})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert finetune("../out [v2] dir", "tuned", data=text, **{**SHORT, "steps": 1}) is not None
    recorded = json.loads((tmp_path / "out [v2] dir" / "spm.json").read_text())
    assert recorded["source"]["name"] == str(tmp_path / "model")
    assert recorded["recipe"]["calibration"]["file"] == str(tmp_path / "text.txt")


def test_a_model_of_one_output_is_matched_by_its_scores(run, text, checkpoints, tmp_path):
    model = BertForSequenceClassification(bert_config(num_labels=1))
    model.save_pretrained(tmp_path / "ranker")
    for file in checkpoints["bert"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "ranker")
    changes = {"rank": 2, "calib": text, "fit.iterations": 2, "calibration.rows": 12}
    spmconvert.convert(tmp_path / "ranker", tmp_path / "out [v2]", **changes)
    options = [f"--set={key}={value}" for key, value in SHORT.items()]
    code, out, _ = run("finetune", tmp_path / "out [v2]", "--data", text, *options)
    assert code == 0
    assert "squared distance to the source's scores" in out
    assert str(tmp_path / "out [v2]-ft") in out, "brackets are no markup"


def test_a_tagger_weighs_tokens_however_its_rows_are_cut(text, checkpoints, tmp_path):
    BertForTokenClassification(bert_config(num_labels=3, initializer_range=0.3)).save_pretrained(tmp_path / "tagger")
    for file in checkpoints["bert"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "tagger")
    uneven = tmp_path / "uneven.txt"
    uneven.write_text("\n".join(line[: 4 + 7 * (number % 9)] for number, line in enumerate(text.read_text().splitlines())))
    spmconvert.convert(
        tmp_path / "tagger", tmp_path / "o", rank=2, calib=text, **{"fit.iterations": 2, "calibration.rows": 12}
    )
    losses = []
    for parts in (1, 4):
        options = {**SHORT, "batch_size": 8, "block_size": 64, "learning_rate": 1e-2, "accumulation": parts, "steps": 6}
        result = finetune(tmp_path / "o", tmp_path / str(parts), data=uneven, **options)
        losses.append([record["held_out_loss"] for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
