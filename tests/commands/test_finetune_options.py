"""What a finetune can be asked for: stages, averages, stored logits, precision, logs, and the place of its output."""

import json
import math
import shutil

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import spmconvert
from spmconvert.checkpoint import places, writer
from spmconvert.checkpoint.converted import open_converted
from spmconvert.commands import finetune as finetuning
from spmconvert.commands.finetune import finetune, store_teacher_logits
from spmconvert.data.training import load_training_data
from spmconvert.distill import loop
from spmconvert.errors import BackendError, CheckpointError, OptionError, OutputError
from spmconvert.recipe.recipe import Training
from tests.support import QUICK, SHORT, files_of, raw_tensors


class Watched:
    """A finetune of the tiny GPT-2 with what it reported: the records of its steps and of its measurements."""

    def __init__(self, converted, text, output, **changes):
        records = []
        self.result = finetune(converted["gpt2"], output, data=text, report=records.append, **{**SHORT, **changes})
        self.steps = [record for record in records if "loss" in record]
        self.measured = [record for record in records if "held_out_loss" in record]
        self.losses = [record["loss"] for record in self.steps]
        recorded = json.loads((output / "spm.json").read_text())["finetune"][0]
        assert changes.items() <= recorded["recipe"].items()
        assert recorded["curve"] == pytest.approx(self.losses, rel=1e-4)
        assert not self.result.stopped
        assert self.result.best_loss < self.result.start_loss


@pytest.fixture(scope="module")
def plain(converted, text, tmp_path_factory):
    """The run that the options change."""
    return Watched(converted, text, tmp_path_factory.mktemp("plain") / "o")


def test_guided_steps_begin_at_the_teacher(converted, text, tmp_path, plain):
    guided = Watched(converted, text, tmp_path / "o", guided=0.5)
    # nothing but the converted layers tells the student from it, and they are replaced at first
    assert guided.losses[0] < 1e-5 * plain.losses[0]
    assert guided.losses[3] < 0.5 * plain.losses[3]
    assert guided.losses[6] > 0.7 * plain.losses[6], "the second half is not guided"
    assert guided.result.start_loss == plain.result.start_loss


def test_an_average_is_measured_and_the_training_goes_on_without_it(converted, text, tmp_path, plain):
    averaged = Watched(converted, text, tmp_path / "o", ema=0.9)
    assert averaged.losses == plain.losses
    # behind the parameters, and the loss falls
    found, last = (run.measured[-1]["held_out_loss"] for run in (averaged, plain))
    assert last < found < averaged.result.start_loss
    parameters, average = (spmconvert.load(run.result.output).state_dict() for run in (plain, averaged))
    assert any(not torch.equal(parameters[name], average[name]) for name in parameters)


def test_distributions_are_matched_at_a_temperature(converted, checkpoints, text, tmp_path):
    found = Watched(converted, text, tmp_path / "o", temperature=2.0)
    student, teacher = (spmconvert.load(place).eval() for place in (converted["gpt2"], checkpoints["gpt2"]))
    rows = load_training_data(str(text), converted["gpt2"], student.config, Training(**SHORT)).held_out
    ids = torch.stack([rows[index] for index in range(SHORT["evaluation_rows"])])
    with torch.no_grad():
        own, wanted = ((model(ids).logits / 2).log_softmax(-1) for model in (student, teacher))
    expected = 4 * (wanted.exp() * (wanted - own)).sum(-1).mean().item()
    assert found.result.start_loss == pytest.approx(expected, rel=1e-4)


def test_the_texts_own_tokens_are_matched_beside(converted, text, tmp_path, plain):
    found = Watched(converted, text, tmp_path / "o", cross_entropy=0.5)
    entropy = math.log(plain.measured[0]["perplexity"])
    assert found.result.start_loss == pytest.approx(plain.result.start_loss + 0.5 * entropy, rel=1e-4)
    assert found.measured[-1]["perplexity"] < plain.measured[0]["perplexity"]


def test_states_and_outputs_of_layers_are_matched_beside(converted, text, tmp_path, plain):
    found = Watched(converted, text, tmp_path / "o", hidden_states=0.5, layer_outputs=0.25)
    first = found.steps[0]
    assert min(first["hidden_states"], first["layer_outputs"]) > 0
    assert first["kl"] == pytest.approx(plain.losses[0], rel=1e-4)
    assert first["loss"] == pytest.approx(
        first["kl"] + 0.5 * first["hidden_states"] + 0.25 * first["layer_outputs"], rel=1e-4
    )
    last = found.steps[-1]
    assert last["hidden_states"] < first["hidden_states"]


def test_products_in_half_precision_give_about_the_same_loss(converted, text, tmp_path, plain):
    found = Watched(converted, text, tmp_path / "o", precision="bf16")
    assert found.losses[0] != plain.losses[0]
    assert found.losses[0] == pytest.approx(plain.losses[0], rel=0.05)
    assert {p.dtype for p in spmconvert.load(tmp_path / "o").parameters()} == {torch.float32}


@pytest.mark.parametrize(("native", "settled"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_what_the_device_multiplies_and_is_recorded(converted, text, tmp_path, monkeypatch, native, settled):
    monkeypatch.setattr("spmconvert.distill.distributed.multiplies_bfloat16", lambda device: native)
    finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, "precision": "auto"})
    assert json.loads((tmp_path / "o" / "spm.json").read_text())["finetune"][0]["recipe"]["precision"] == settled


def test_gradient_checkpointing_computes_twice_what_comes_out_the_same(converted, text, tmp_path, plain, monkeypatch):
    forward, calls = GPT2MLP.forward, []

    def counted(*arguments):
        # the teacher and measurements need no gradient
        calls.append(torch.is_grad_enabled())
        return forward(*arguments)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    thrifty = Watched(converted, text, tmp_path / "o", gradient_checkpointing=True)
    assert thrifty.losses == pytest.approx(plain.losses, rel=1e-5)
    # two blocks, forward and again in the backward pass
    assert sum(calls) == 2 * 2 * len(thrifty.steps)


def test_a_compiled_student_learns_the_same(converted, text, tmp_path, plain, monkeypatch):
    calls = []

    def compiled(function):
        def call(*arguments, **options):
            calls.append(torch.is_grad_enabled())
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    found = Watched(converted, text, tmp_path / "o", compile=True)
    assert sum(calls) == len(found.steps), "every step runs what was compiled"
    assert found.losses == plain.losses


def test_minutes_know_how_long_a_measurement_takes_behind_a_layerwise_stage(converted, text, tmp_path, monkeypatch):
    given, plan = [], loop.planned_steps
    monkeypatch.setattr(loop, "planned_steps", lambda *those: given.append(those[2]) or plan(*those))
    finetune(converted["gpt2"], tmp_path / "o", data=text, layerwise=1, learning_rate=1e-3, **SHORT)
    assert given[0] > 0


def test_layerwise_stage_comes_first_and_is_measured(converted, text, tmp_path):
    records = []
    result = finetune(
        converted["gpt2"], tmp_path / "o", data=text, layerwise=40, learning_rate=1e-3, report=records.append, **SHORT
    )
    matched = [record for record in records if "layer" in record]
    assert [record["matched"] for record in matched] == [1, 2, 3, 4]
    assert all(record["after"] <= record["before"] for record in matched)
    assert any(record["after"] < 0.95 * record["before"] for record in matched)
    assert [entry["step"] for entry in result.history[:2]] == [0, 0], "measured before and after it"


def test_all_stages_resume_to_the_same_bytes(converted, text, tmp_path):
    options = {**SHORT, "layerwise": 6, "guided": 0.8, "ema": 0.8, "train": "norms"}
    finetune(converted["gpt2"], tmp_path / "whole", data=text, **options)

    def stop_at_layer(record):
        if record.get("matched") == 3:
            raise KeyboardInterrupt

    for stop in (stop_at_layer, stop_at(7)):
        with pytest.raises(KeyboardInterrupt):
            finetune(converted["gpt2"], tmp_path / "cut", data=text, report=stop, **options)
        finetune(converted["gpt2"], tmp_path / "cut", data=text, resume=True, **options)
        assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
        logs = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("whole", "cut")]
        steps = [[json.loads(line)["step"] for line in log if '"loss"' in line] for log in logs]
        assert steps[0] == steps[1] == list(range(1, 13)), "the log has every step once"
        shutil.rmtree(tmp_path / "cut")


def stop_at(step):
    def report(record):
        if record.get("step") == step and "loss" in record:
            raise KeyboardInterrupt

    return report


def test_stored_logits_take_the_teachers_place(converted, text, tmp_path, plain):
    store_teacher_logits(converted["gpt2"], tmp_path / "logits", data=text, words=96, **SHORT)
    stored = finetune(converted["gpt2"], tmp_path / "b", data=text, teacher_logits=tmp_path / "logits", **SHORT)
    assert stored.best_loss == pytest.approx(plain.result.best_loss, rel=0.02), "all words were stored"
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


def watched_output(monkeypatch):
    """Space that finetunes ask for, and the training states that they keep, from now on."""
    asked, states = [], []

    class Asked(writer.OutputDirectory):
        def __init__(self, *given, needed_bytes, **options):
            asked.append(needed_bytes)
            super().__init__(*given, needed_bytes=needed_bytes, **options)

        def save_file(self, name, save):
            super().save_file(name, save)
            states.append(torch.load(self.partial / name))

    monkeypatch.setattr(finetuning, "OutputDirectory", Asked)
    return asked, states


@pytest.mark.parametrize("changes", [{}, {"train": "norms"}, {"train": "all", "ema": 0.9}], ids=str)
def test_the_space_that_is_asked_for_holds_the_state_twice(converted, text, tmp_path, monkeypatch, changes):
    asked, states = watched_output(monkeypatch)
    finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, **changes})
    written = sum(len(content) for _, content in raw_tensors(tmp_path / "o").values())
    state = states[-1]
    parts = (state["parameters"], state["state"]["best"], state["state"]["average"], *state["moments"].values())
    held = sum(tensor.nbytes for part in parts for tensor in part.values() if tensor.ndim)
    assert asked == [written + 2 * held]


@pytest.mark.parametrize("name", ["sparse24", "lowrank", "wrapped"])
def test_terms_of_every_kind_are_trained_in_the_space_that_was_asked_for(sums, text, tmp_path, monkeypatch, name):
    asked, states = watched_output(monkeypatch)
    result = finetune(sums[name], tmp_path / "o", data=text, learning_rate=2e-4, **SHORT)
    assert result.best_loss < result.start_loss
    before, after = raw_tensors(sums[name]), raw_tensors(tmp_path / "o")
    layers = open_converted(sums[name]).layers
    inside = {key for key in before if key.startswith(tuple(f"{layer}." for layer in layers))}
    fixed = {key for key in inside if key.endswith(("positions", *(f"{layer}.weight" for layer in layers)))}
    assert {key for key in before if before[key] != after[key]} == inside - fixed
    written, state = sum(len(content) for _, content in after.values()), states[-1]
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
        finetune(converted["gpt2"], tmp_path / "o", data=text, **{**SHORT, "precision": "fp16"})
    with pytest.raises(OptionError, match="several processes"):
        finetune(converted["gpt2"], tmp_path / "o", data=text, shard=True, **SHORT)


def test_recipe_file_and_keywords(converted, text, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[finetune]\nsteps = 5\nbatch_size = 4\nblock_size = 32\n")
    assert finetune(converted["gpt2"], tmp_path / "o", data=text, recipe=recipe).steps == 5
    assert finetune(converted["gpt2"], tmp_path / "p", data=text, recipe=recipe, steps=3).steps == 3
