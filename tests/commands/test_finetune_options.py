"""What a finetune can be asked for: stages, averages, stored logits, precision, logs, and the place of its output."""

import json
import shutil

import pytest
import torch

import spmconvert
from spmconvert.checkpoint import places, writer
from spmconvert.commands import finetune as finetuning
from spmconvert.commands.finetune import finetune, store_teacher_logits
from spmconvert.errors import BackendError, CheckpointError, OptionError, OutputError
from tests.support import QUICK, SHORT, files_of, raw_tensors


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


@pytest.mark.parametrize("moment", ["before the last rename", "after it"])
def test_a_result_that_was_killed_on_its_way_into_place_is_found_again(converted, text, tmp_path, monkeypatch, moment):
    shutil.copytree(converted["gpt2"], tmp_path / "m")
    options = {"data": text, "in_place": True, **SHORT}

    def killed(*_, **__):
        raise KeyboardInterrupt

    def killed_in_commit(output):
        # the first call, at the beginning, has nothing to do
        if (tmp_path / ".m.partial" / places.COMMIT_FILE).exists():
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        if moment == "before the last rename":
            patch.setattr(writer, "finish_commit", killed_in_commit)
        else:
            patch.setattr(places.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path / "m", **options)
    assert (tmp_path / "m").exists() == (moment == "after it")
    found = finetune(tmp_path / "m", resume=True, **options)
    runs = json.loads((tmp_path / "m" / "spm.json").read_text())["finetune"]
    assert [run["best_loss"] for run in runs] == [found.best_loss]
    assert found.steps == SHORT["steps"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.jsonl"]
    with pytest.raises(OutputError, match="finetuned in place with these settings"):
        finetune(tmp_path / "m", **options)
    finetune(tmp_path / "m", force=True, **options)
    assert len(json.loads((tmp_path / "m" / "spm.json").read_text())["finetune"]) == 2


def test_a_file_beside_the_weights_is_not_lost_in_place(converted, text, tmp_path):
    shutil.copytree(converted["gpt2"], tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("x")
    finetune(tmp_path / "m", data=text, in_place=True, **SHORT)
    assert (tmp_path / "m" / "notes.txt").read_text() == "x", "copied, as tokenizers are"
    (tmp_path / "m" / "runs").mkdir()
    (tmp_path / "m" / "runs" / "notes.txt").write_text("x")
    with pytest.raises(OutputError, match=r"runs/notes\.txt, which spmconvert did not write"):
        finetune(tmp_path / "m", data=text, in_place=True, **{**SHORT, "seed": 1})


@pytest.mark.parametrize("kind", ["data", "file", "link"])
def test_the_log_overwrites_no_other_file(converted, text, tmp_path, kind):
    file, log = tmp_path / "precious", tmp_path / "o.jsonl"
    lines = "".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines())
    file.write_text(lines)
    if kind == "link":
        log.symlink_to(file)
    else:
        log.write_text(lines)
    with pytest.raises(OutputError, match=r"o\.jsonl, which is no log"):
        finetune(converted["gpt2"], tmp_path / "o", data=log if kind == "data" else text, **SHORT)
    assert log.read_text() == file.read_text() == lines
    log.unlink()
    finetune(converted["gpt2"], tmp_path / "o", data=text, **SHORT)
    first = log.read_text()
    finetune(converted["gpt2"], tmp_path / "o", data=text, force=True, **SHORT)
    assert len(log.read_text().splitlines()) == len(first.splitlines()), "its own log is written anew"


@pytest.mark.parametrize("command", ["finetune", "export"])
def test_force_never_replaces_the_source(checkpoints, text, tmp_path, command):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "home" / "dense")
    dense = tmp_path / "home" / "dense"
    spmconvert.convert(dense, tmp_path / "spm", rank=2, calib=text, **QUICK)
    before = files_of(dense)
    for output in (dense, tmp_path / "home", dense / "inside"):
        options = {"data": text, **SHORT} if command == "finetune" else {}
        with pytest.raises(OptionError, match=r"(is|holds|lies inside of) the (teacher|source)"):
            getattr(spmconvert, command)(tmp_path / "spm", output, force=True, **options)
    assert files_of(dense) == before


@pytest.mark.parametrize("changes", [{}, {"train": "norms"}, {"train": "all", "ema": 0.9}], ids=str)
def test_the_space_that_is_asked_for_holds_the_state_twice(converted, text, tmp_path, monkeypatch, changes):
    asked, states = [], []

    class Asked(writer.OutputDirectory):
        def __init__(self, *given, needed_bytes, **options):
            asked.append(needed_bytes)
            super().__init__(*given, needed_bytes=needed_bytes, **options)

        def save_file(self, name, save):
            super().save_file(name, save)
            states.append(torch.load(self.partial / name))

    monkeypatch.setattr(finetuning, "OutputDirectory", Asked)
    finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, **changes})
    written = sum(len(content) for _, content in raw_tensors(tmp_path / "o").values())
    state = states[-1]
    parts = (state["parameters"], state["state"]["best"], state["state"]["average"], *state["moments"].values())
    held = sum(tensor.nbytes for part in parts for tensor in part.values() if tensor.ndim)
    assert asked == [written + 2 * held]


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
