"""What a finetune can be asked for: stages, averages, stored logits, precision, logs, and the place of its output."""

import json

import pytest
import torch

import spmconvert
from spmconvert.commands.finetune import finetune, store_teacher_logits
from spmconvert.errors import BackendError, CheckpointError, OptionError, OutputError
from tests.support import SHORT, files_of


@pytest.mark.parametrize(
    "changes",
    [
        {"layerwise": 10},
        {"guided": 0.5},
        {"ema": 0.9},
        {"temperature": 2.0, "cross_entropy": 0.5},
        {"hidden_states": 0.5, "layer_outputs": 0.5},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_option_helps_and_is_recorded(converted, text, tmp_path, changes):
    result = finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, "steps": 30}, **changes)
    assert result.best_loss < result.start_loss
    assert not result.stopped
    recorded = json.loads((tmp_path / "o" / "spm.json").read_text())["finetune"][0]
    assert changes.items() <= recorded["recipe"].items()
    assert len(recorded["curve"]) == 30


def test_gradient_checkpointing_changes_nothing(converted, text, tmp_path):
    plain = finetune(converted["gpt2"], tmp_path / "a", data=text, **SHORT)
    thrifty = finetune(converted["gpt2"], tmp_path / "b", data=text, gradient_checkpointing=True, **SHORT)
    assert plain.best_loss == pytest.approx(thrifty.best_loss, rel=1e-3)


def test_layerwise_stage_comes_first_and_is_measured(converted, text, tmp_path):
    records = []
    result = finetune(converted["gpt2"], tmp_path / "o", data=text, layerwise=40, report=records.append, **SHORT)
    matched = [record for record in records if "layer" in record]
    assert [record["matched"] for record in matched] == [1, 2, 3, 4]
    assert all(record["after"] <= record["before"] for record in matched)
    assert any(record["after"] < 0.95 * record["before"] for record in matched)
    assert [entry["step"] for entry in result.history[:2]] == [0, 0], "measured before and after it"


@pytest.mark.parametrize("at", ["layer", "step"])
def test_all_stages_resume_to_the_same_bytes(converted, text, tmp_path, at):
    options = {**SHORT, "layerwise": 6, "guided": 0.8, "ema": 0.8, "train": "norms"}
    finetune(converted["gpt2"], tmp_path / "whole", data=text, **options)

    def interrupt(record):
        if record.get("matched") == 3 if at == "layer" else record["step"] == 7 and "loss" in record:
            raise KeyboardInterrupt

    def tolerant(record):
        if at == "step" and "layer" in record:
            return
        interrupt(record)

    with pytest.raises(KeyboardInterrupt):
        finetune(converted["gpt2"], tmp_path / "cut", data=text, report=tolerant, **options)
    finetune(converted["gpt2"], tmp_path / "cut", data=text, resume=True, **options)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
    logs = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    steps = [[json.loads(line)["step"] for line in log if '"loss"' in line] for log in logs]
    assert steps[0] == steps[1] == list(range(1, 13)), "the log has every step once"


def test_compiled_student_learns_the_same(converted, text, tmp_path, monkeypatch):
    compiled = []

    def watched(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", watched)
    finetune(converted["gpt2"], tmp_path / "o", data=text, compile=True, **SHORT)
    assert len(compiled) == 1


def stop_at(step):
    def report(record):
        if record.get("step") == step and "loss" in record:
            raise KeyboardInterrupt

    return report


def test_stored_logits_take_the_teachers_place(converted, text, tmp_path):
    store_teacher_logits(converted["gpt2"], tmp_path / "logits", data=text, words=96, **SHORT)
    with_teacher = finetune(converted["gpt2"], tmp_path / "a", data=text, **SHORT)
    stored = finetune(converted["gpt2"], tmp_path / "b", data=text, teacher_logits=tmp_path / "logits", **SHORT)
    assert stored.best_loss == pytest.approx(with_teacher.best_loss, rel=0.02), "all words were stored"
    with pytest.raises(KeyboardInterrupt):
        finetune(converted["gpt2"], tmp_path / "d", data=text, report=stop_at(10), **SHORT)
    with pytest.raises(OutputError, match="other settings"):
        finetune(converted["gpt2"], tmp_path / "d", data=text, teacher_logits=tmp_path / "logits", resume=True, **SHORT)
    with pytest.raises(OutputError, match="exists"):
        store_teacher_logits(converted["gpt2"], tmp_path / "logits", data=text, **SHORT)
    with pytest.raises(CheckpointError, match="lack a row"):
        finetune(
            converted["gpt2"],
            tmp_path / "c",
            data=text,
            teacher_logits=tmp_path / "logits",
            **{**SHORT, "block_size": 20},
        )
    with pytest.raises(OptionError, match="guided"):
        finetune(converted["gpt2"], tmp_path / "c", data=text, teacher_logits=tmp_path / "logits", guided=0.5, **SHORT)
    with pytest.raises(CheckpointError, match="another teacher"):
        finetune(converted["llama-bf16"], tmp_path / "c", data=text, teacher_logits=tmp_path / "logits", **SHORT)
    with pytest.raises(CheckpointError, match="no stored logits"):
        finetune(converted["gpt2"], tmp_path / "c", data=text, teacher_logits=tmp_path / "none", **SHORT)
    with pytest.raises(OptionError, match="no logits over words"):
        store_teacher_logits(converted["bert"], tmp_path / "d", data=text, **SHORT)
    with pytest.raises(OptionError, match="ask for fewer"):
        store_teacher_logits(converted["gpt2"], tmp_path / "d", data=text, words=1000, **SHORT)


def test_in_place_and_repeated(converted, text, tmp_path):
    import shutil

    shutil.copytree(converted["gpt2"], tmp_path / "m")
    with pytest.raises(OptionError, match="choose one"):
        finetune(tmp_path / "m", tmp_path / "o", data=text, in_place=True, **SHORT)
    with pytest.raises(OptionError, match=r"is the input.*--in-place"):
        finetune(tmp_path / "m", tmp_path / "m", data=text, **SHORT)
    first = finetune(tmp_path / "m", data=text, in_place=True, **SHORT)
    second = finetune(tmp_path / "m", data=text, in_place=True, **{**SHORT, "seed": 1})
    assert first.output == second.output == tmp_path / "m"
    runs = json.loads((tmp_path / "m" / "spm.json").read_text())["finetune"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert (tmp_path / "m" / "README.md").read_text().count("distilled against its source") == 2
    assert spmconvert.load(tmp_path / "m")
    default = finetune(tmp_path / "m", data=text, **SHORT)
    assert default.output == tmp_path / "m-ft"


def test_tracker(converted, text, tmp_path):
    finetune(converted["gpt2"], tmp_path / "o", data=text, tracker="tensorboard", **SHORT)
    assert list((tmp_path / "o-runs").rglob("events.out.tfevents.*"))
    with pytest.raises(OptionError, match=r"not installed; installed are: .*tensorboard"):
        finetune(converted["gpt2"], tmp_path / "p", data=text, tracker="nothing", **SHORT)


def test_what_a_cpu_cannot_do(converted, text, tmp_path):
    with pytest.raises(BackendError, match="fp16"):
        finetune(converted["gpt2"], tmp_path / "o", data=text, precision="fp16", **SHORT)
    with pytest.raises(OptionError, match="several processes"):
        finetune(converted["gpt2"], tmp_path / "o", data=text, shard=True, **SHORT)


def test_recipe_file_and_keywords(converted, text, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[finetune]\nsteps = 5\nbatch_size = 4\nblock_size = 32\n")
    assert finetune(converted["gpt2"], tmp_path / "o", data=text, recipe=recipe).steps == 5
    assert finetune(converted["gpt2"], tmp_path / "p", data=text, recipe=recipe, steps=3).steps == 3
