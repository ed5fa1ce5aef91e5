"""The whole conversion through the Python API: what is written, what stays, resuming, and every design."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import spmconvert
from spmconvert.checkpoint.manifest import dense_config
from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.commands.verify import verify
from spmconvert.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    CorruptCheckpointError,
    OptionError,
    OutputError,
    RecipeError,
    TargetError,
)
from spmconvert.fit.progress import Silent
from spmconvert.recipe.recipe import Recipe
from tests.support import QUICK, files_of, raw_tensors

# two of every block, three where there is a gate
MLP_LAYERS = {"gpt2": 4, "llama": 9, "llama-tied": 9, "llama-sharded": 9, "llama-bf16": 9, "bert": 4}


# tensors of a layer that is stages alone
STAGES = ("weight", "spm.weight", "spm.scale_in", "spm.scale_out", "bias")


def prefixes(tensors):
    return {key.rpartition(".")[0] for key in tensors}


def terms_of(layer):
    """Numbers of a layer's terms by kind."""
    return {term.kind: term for term in layer.design.terms}


@pytest.mark.parametrize("name", MLP_LAYERS)
def test_untargeted_tensors_are_byte_identical(checkpoints, text, tmp_path, name):
    result = spmconvert.convert(checkpoints[name], tmp_path / "out", targets="mlp", calib=text, **QUICK)
    before, after = raw_tensors(checkpoints[name]), raw_tensors(tmp_path / "out")
    # names of a checkpoint may lack the base model's prefix
    replaced = {prefix for prefix in prefixes(before) if any(layer.name.endswith(prefix) for layer in result.layers)}
    assert len(replaced) == len(result.layers) == MLP_LAYERS[name]
    kept = {key: value for key, value in before.items() if key.rpartition(".")[0] not in replaced}
    assert prefixes(kept) == prefixes(before) - replaced
    inside = tuple(f"{prefix}." for prefix in replaced)
    refined = json.loads((tmp_path / "out" / "spm.json").read_text())["refined"]["tensors"]
    assert all(len(after[key][1]) == len(kept[key][1]) for key in refined)
    assert {key: kept[key] if key in refined else after[key] for key in after if not key.startswith(inside)} == kept
    # a layer has a bias where the dense one has one
    parts = STAGES if name in ("gpt2", "bert") else STAGES[:-1]
    assert {f"{prefix}.{part}" for prefix in replaced for part in parts} == after.keys() - kept.keys()
    assert sum(len(value) for _, value in after.values()) == result.bytes_after
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((checkpoints[name] / "config.json").read_text())
    assert dense_config(config) == source
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoints[name] / "tokenizer.json").read_bytes()


def test_records_are_true(checkpoints, text, tmp_path):
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "out", targets="mlp", calib=text, **QUICK)
    model = spmconvert.load(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == result.parameters_after
    dense = spmconvert.load(checkpoints["gpt2"])
    assert sum(p.numel() for p in dense.parameters()) == result.parameters_before
    for record in result.layers:
        layer = model.get_submodule(record.name)
        assert record.parameters == sum(p.numel() for p in layer.parameters())
        assert 0 < record.error < 1
        assert record.baseline_rank * (record.in_features + record.out_features) <= record.parameters
    provenance = json.loads((tmp_path / "out" / "spm.json").read_text())
    assert provenance["source"]["sha256"] == open_checkpoint(str(checkpoints["gpt2"])).sha256()
    assert provenance["calibration"]["held_out_rows"] == result.held_out_rows > 0
    assert provenance["recipe"]["fit"]["iterations"] == 8
    assert [layer["error"] for layer in provenance["layers"]] == [record.error for record in result.layers]
    assert "has not been finetuned" in (tmp_path / "out" / "README.md").read_text()


def test_recorded_error_is_the_error_of_the_saved_layer(checkpoints, text, tmp_path):
    from spmconvert.data.calibration import load_rows
    from spmconvert.recipe.recipe import Calibration

    result = spmconvert.convert(checkpoints["bert"], tmp_path / "out", targets="mlp", calib=text, **QUICK)
    dense, model = spmconvert.load(checkpoints["bert"]), spmconvert.load(tmp_path / "out")
    rows = load_rows(checkpoints["bert"], dense.config, Calibration(file=text, rows=24), seed=0)
    record = result.layers[1]
    inputs = []
    handle = dense.get_submodule(record.name).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for batch in rows.batches(rows.held_out, dense.eval()):
            dense(**batch)
            inputs[-1] = inputs[-1][batch["attention_mask"].bool()]
        handle.remove()
        x = torch.cat(inputs)
        y, approximate = dense.get_submodule(record.name)(x), model.get_submodule(record.name)(x)
    assert record.error == pytest.approx(((y - approximate).square().sum() / y.square().sum()).item(), rel=1e-3)


def test_calibration_beats_the_frobenius_fit_on_held_out_rows(checkpoints, text, tmp_path):
    options = {"targets": "mlp", "layers": "0", "fit.iterations": 60, "calibration.rows": 100}
    weighted = spmconvert.convert(checkpoints["llama"], tmp_path / "w", calib=text, **options)
    plain = spmconvert.convert(checkpoints["llama"], tmp_path / "p", targets="mlp", layers="0", **{"fit.iterations": 60})
    assert plain.held_out_rows == 0
    assert "no data was used" in plain.measured_on
    assert sum(r.error for r in weighted.layers) < sum(r.error for r in plain.layers)


@pytest.mark.parametrize(
    "design",
    [{"variant": "rotation"}, {"block": 2, "stages": 3}, {"rank": 2}, {"stages": 3}, {"stages": 0, "rank": 3}],
    ids=lambda design: "-".join(f"{k}{v}" for k, v in design.items()),
)
def test_every_design_round_trips(checkpoints, text, tmp_path, design):
    options = {**QUICK, **design}
    spmconvert.convert(checkpoints["llama"], tmp_path / "out", targets="*.up_proj", calib=text, new_bias=True, **options)
    model = spmconvert.load(tmp_path / "out")
    layer = model.model.layers[0].mlp.up_proj
    terms = terms_of(layer)
    kinds = ["spm"] if design.get("stages") != 0 else []
    assert list(terms) == kinds + (["lowrank"] if "rank" in design else [])
    for key, value in design.items():
        if key == "rank":
            assert terms["lowrank"].rank == value
        elif terms.get("spm"):
            assert getattr(terms["spm"], key) == value
    assert layer.held_bias is not None


@pytest.mark.parametrize(
    ("terms", "kinds"),
    [
        ([{"kind": "sparse24"}], ["sparse24"]),
        ([{"kind": "lowrank", "rank": 3}], ["lowrank"]),
        ([{"kind": "spm", "stages": 3, "block": 2}], ["spm"]),
        ([{"kind": "lowrank", "rank": 2}, {"kind": "spm"}], ["spm", "lowrank"]),
        ([{"kind": "lowrank", "rank": 2}, {"kind": "sparse24"}], ["sparse24", "lowrank"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value[0], str) else "",
)
def test_terms_by_name_round_trip(checkpoints, text, tmp_path, terms, kinds):
    result = spmconvert.convert(
        checkpoints["llama"], tmp_path / "out", targets="*.up_proj", calib=text, **QUICK, **{"design.terms": terms}
    )
    layer = spmconvert.load(tmp_path / "out").model.layers[0].mlp.up_proj
    assert list(terms_of(layer)) == kinds
    for entry in terms:
        found = terms_of(layer)[entry["kind"]].to_json()
        assert found.items() >= entry.items()
    assert layer.held_bias is None, "the dense layer has none"
    assert all(0 < record.error < 1 for record in result.layers)
    stored = sum(len(content) for _, content in raw_tensors(tmp_path / "out").values())
    assert stored == result.bytes_after
    assert sum(p.numel() for p in spmconvert.load(tmp_path / "out").parameters()) == result.parameters_after


def test_terms_by_name_are_read_from_a_recipe_and_recorded(checkpoints, text, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('[design]\nterms = [{kind = "sparse24"}, {kind = "lowrank", rank = 2}]\n[fit]\niterations = 4\n')
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "a", recipe=file, calib=text, **{"calibration.rows": 24})
    recorded = json.loads((tmp_path / "a" / "spm.json").read_text())["recipe"]
    assert recorded["design"]["terms"] == [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 2}]
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "b", recipe=Recipe.model_validate(recorded))
    assert raw_tensors(tmp_path / "a") == raw_tensors(tmp_path / "b")


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([{"kind": "sparse24", "rank": 3}], r"sparse24 term has \['rank'\]; known are"),
        ([{"kind": "spm", "rank": 3}], r"spm term has \['rank'\]; known are"),
        ([{"kind": "lowrank", "rank": 0}], "rank of a lowrank term is 0"),
        ([{"kind": "lowrank", "rank": 33}], "at most"),
        ([{"kind": "sparse24"}, {"kind": "sparse24"}], "at most one of a kind"),
    ],
)
def test_terms_that_no_layer_can_have_are_refused(checkpoints, tmp_path, terms, words):
    with pytest.raises(OptionError, match=words):
        spmconvert.convert(checkpoints["llama"], tmp_path / "o", **{"design.terms": terms})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"design.terms": []}, "design.terms .* is empty; give at least 1"),
        ({"design.terms": [{"kind": "dense"}]}, "kind 'dense'; choose among spm"),
        ({"design.terms": [{"rank": 3}]}, "kind None"),
        ({"design.terms": [{"kind": "sparse24"}], "rank": 2}, "terms and rank are both given"),
        ({"design.terms": [{"kind": "sparse24"}], "keep": 0.5}, "keep chooses the design of every layer"),
        ({"overrides": [{"pattern": "*", "rank": 2, "terms": [{"kind": "sparse24"}]}]}, "terms and rank are both given"),
        ({"overrides": [{"pattern": "*", "terms": [{"kind": "dense"}]}]}, "kind 'dense'; choose among spm"),
        ({"overrides": [{"pattern": "*", "variant": "rotation", "block": 2}]}, "rotation needs block 1"),
    ],
)
def test_terms_that_contradict_the_recipe_are_refused(checkpoints, tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        spmconvert.convert(checkpoints["llama"], tmp_path / "o", **changes)


def test_overrides_change_single_layers(checkpoints, text, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(
        '[design]\nstages = 3\n[fit]\niterations = 4\n[[overrides]]\npattern = "*.c_proj"\nrank = 2\n'
        '[[overrides]]\npattern = "re:.*h\\\\.1\\\\..*"\nstages = 4\n'
    )
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "out", recipe=file, calib=text)
    layers = spmconvert.load(tmp_path / "out").transformer.h
    found = [terms_of(layer) for h in layers for layer in (h.mlp.c_fc, h.mlp.c_proj)]
    assert [(terms["spm"].stages, "lowrank" in terms and terms["lowrank"].rank) for terms in found] == [
        (3, False),
        (3, 2),
        (4, False),
        (4, 2),
    ]


def test_overrides_name_terms_in_the_place_of_numbers_and_the_other_way_round(checkpoints, tmp_path):
    terms = [{"kind": "sparse24"}]
    by_terms, by_numbers = {"pattern": "*.c_proj", "terms": terms}, {"pattern": "*.h.1.*", "stages": 3}
    options = {"fit.iterations": 1, "stages": 4, "overrides": [by_terms, by_numbers]}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "a", **options)
    layers = spmconvert.load(tmp_path / "a").transformer.h
    found = [[term.describe() for term in layer.design.terms] for h in layers for layer in (h.mlp.c_fc, h.mlp.c_proj)]
    assert found == [["4 stages, general"], ["2:4"], ["3 stages, general"], ["3 stages, general"]]


def test_an_override_that_leaves_no_design_is_refused(checkpoints, tmp_path):
    options = {"variant": "rotation", "overrides": [{"pattern": "*.c_proj", "block": 2}]}
    with pytest.raises(OptionError, match=r"c_proj.*rotation needs block 1"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)


def test_override_that_matches_nothing_is_an_error(checkpoints, tmp_path):
    with pytest.raises(OptionError, match="matches none"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", overrides=[{"pattern": "*.up_proj", "rank": 2}])


def test_two_runs_give_the_same_bytes(checkpoints, text, tmp_path):
    for name in ("a", "b"):
        spmconvert.convert(checkpoints["bert"], tmp_path / name, targets="mlp", calib=text, seed=3, **QUICK)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


class StopAfter(Silent):
    """Interrupts a conversion once so many layers are fitted."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def planned(self, plan):
        pass

    def calibrating(self, done, total):
        pass

    def measured(self, name, done, total):
        pass

    def fitted(self, record, done, total):
        if done == self.layers:
            raise KeyboardInterrupt

    def refined(self, name, done, total):
        pass

    def writing(self, total_bytes):
        pass


@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_run_resumes_to_the_same_bytes(checkpoints, text, tmp_path, after):
    options = {"targets": "mlp", "calib": text, **QUICK}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "cut", progress=StopAfter(after), **options)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(OutputError, match="settings"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "cut", resume=True, seed=9, **options)
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "cut", resume=True, **options)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


class StopBetweenBlocks(StopAfter):
    """Interrupts a conversion once so many blocks are refined."""

    def fitted(self, record, done, total):
        pass

    def refined(self, name, done, total):
        if done == self.layers:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [StopAfter(4), StopBetweenBlocks(1), StopBetweenBlocks(3)], ids=["in", "between", "end"])
def test_refinement_resumes_to_the_same_bytes(checkpoints, text, tmp_path, stop):
    options = {"targets": "mlp", "calib": text, "sequential": True, **QUICK, "fit.refine": 2}
    state = torch.get_rng_state()
    spmconvert.convert(checkpoints["llama"], tmp_path / "whole", **options)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(checkpoints["llama"], tmp_path / "cut", progress=stop, **options)
    spmconvert.convert(checkpoints["llama"], tmp_path / "cut", resume=True, **options)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-bf16", "bert"])
def test_refinement_changes_layers_norms_and_biases_and_says_which(checkpoints, text, tmp_path, name):
    options = {"targets": "mlp", "calib": text, "rank": 4, **QUICK}
    spmconvert.convert(checkpoints[name], tmp_path / "fitted", **options)
    spmconvert.convert(checkpoints[name], tmp_path / "refined", **{**options, "fit.refine": 8})
    fitted, refined = (raw_tensors(tmp_path / which) for which in ("fitted", "refined"))
    assert {key: len(value[1]) for key, value in fitted.items()} == {key: len(value[1]) for key, value in refined.items()}
    record = json.loads((tmp_path / "refined" / "spm.json").read_text())
    named = set(record["refined"]["tensors"])
    layers = tuple(entry["name"] for entry in record["layers"])
    changed = {key for key in fitted if fitted[key] != refined[key]}
    assert changed
    assert {key for key in changed if not key.startswith(layers)} <= named
    assert not any(key.startswith(layers) for key in named)
    dense = raw_tensors(checkpoints[name])
    assert all(fitted[key] == dense[key] for key in named)
    blocks = record["refined"]["blocks"].values()
    assert len(blocks) == {"gpt2": 2, "bert": 2}.get(name, 3)
    assert all(block["after"] <= block["before"] for block in blocks)
    assert {check.outcome for check in verify(tmp_path / "refined")} == {"ok", "skipped"}
    assert json.loads((tmp_path / "fitted" / "spm.json").read_text())["refined"] == {"blocks": {}, "tensors": []}


def test_a_norm_that_is_not_said_to_be_refined_does_not_pass(checkpoints, text, tmp_path):
    output = tmp_path / "o"
    spmconvert.convert(checkpoints["llama"], output, targets="mlp", calib=text, rank=4, **{**QUICK, "fit.refine": 8})
    record = json.loads((output / "spm.json").read_text())
    record["refined"]["tensors"] = record["refined"]["tensors"][1:]
    (output / "spm.json").write_text(json.dumps(record))
    outcomes = {check.name: check.outcome for check in verify(output)}
    assert outcomes["untouched tensors"] == "FAILED"


def test_a_model_that_cannot_be_refined_is_converted_and_says_so(checkpoints, text, tmp_path):
    options = {"targets": "*.dense", "calib": text, **QUICK}
    result = spmconvert.convert(checkpoints["bert"], tmp_path / "o", **{**options, "fit.refine": None})
    assert "no block was refined" in result.measured_on
    assert "the whole model was in memory" in result.measured_on
    assert json.loads((tmp_path / "o" / "spm.json").read_text())["recipe"]["fit"]["refine"] == 0
    result = spmconvert.convert(checkpoints["bert"], tmp_path / "p", **options)
    assert "refined" not in result.measured_on
    assert "the whole model was in memory" in result.measured_on
    result = spmconvert.convert(checkpoints["bert"], tmp_path / "q", **{**options, "targets": "mlp"})
    assert "in memory" not in result.measured_on


def test_refinement_needs_rows_and_one_path(checkpoints, text, tmp_path):
    with pytest.raises(RecipeError, match="refine needs calibration rows"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", refine=2)
    with pytest.raises(OptionError, match="in one list of blocks"):
        spmconvert.convert(checkpoints["bert"], tmp_path / "o", **{**QUICK, "fit.refine": 2}, targets="*.dense", calib=text)
    with pytest.raises(RecipeError, match="max_error limits"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", calib=text, refine=2, max_error=0.5)


class Calibrations(StopAfter):
    """Notes what is calibrated, besides."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.calibrated: list[tuple[int, int]] = []

    def calibrating(self, done, total):
        self.calibrated.append((done, total))


def test_a_resumed_run_takes_the_moments_that_it_gathered(checkpoints, text, tmp_path):
    options = {"targets": "mlp", "calib": text, **QUICK}
    first, second = Calibrations(1), Calibrations(0)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", progress=first, **options)
    assert first.calibrated[-1][0] == first.calibrated[-1][1] > 0
    # of every layer its moments on the fitted and on the held-out rows
    assert len(list((tmp_path / ".o.partial" / "moments").glob("*.safetensors"))) == 2 * MLP_LAYERS["gpt2"]
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", progress=second, resume=True, **options)
    assert second.calibrated == []
    assert not list((tmp_path / "o").rglob("moments"))
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from spmconvert.commands.convert import convert
model, place, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
for name, delay in (("early", 0.0), ("late", 0.6)):
    child = os.fork()
    if child == 0:
        convert(model, place / name, **options)
        os._exit(0)
    deadline, ended = time.monotonic() + 60, 0
    while not ended and not list((place / f".{name}.partial" / "layers").glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        ended = os.waitpid(child, os.WNOHANG)[0]
    time.sleep(delay)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def test_killed_run_leaves_nothing_that_looks_complete_and_resumes(checkpoints, text, tmp_path):
    options = {"targets": "mlp", "calib": str(text), **QUICK}
    command = [sys.executable, "-c", KILLED, str(checkpoints["gpt2"]), str(tmp_path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "whole", **options)
    for name in ("early", "late"):
        if not (tmp_path / name).exists():
            spmconvert.convert(checkpoints["gpt2"], tmp_path / name, resume=True, **options)
        assert files_of(tmp_path / name) == files_of(tmp_path / "whole")


def test_tied_head_is_left_alone_and_naming_it_explains(checkpoints, tmp_path):
    with pytest.raises(TargetError, match="embed_tokens"):
        spmconvert.convert(checkpoints["llama-tied"], tmp_path / "o", targets="lm_head", stages=3)


def test_growing_layer_is_refused_unless_forced(checkpoints, tmp_path):
    with pytest.raises(TargetError, match="would not get smaller"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", targets="attn", stages=40)
    options = {"allow_growth": True, "fit.iterations": 1}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", targets="attn", stages=40, **options)


def test_non_finite_weight_in_a_target_is_refused(checkpoints, text, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(checkpoints["bert"], source)
    tensors = load_file(source / "model.safetensors")
    tensors["encoder.layer.0.intermediate.dense.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=r"encoder\.layer\.0\.intermediate\.dense\.weight"):
        spmconvert.convert(source, tmp_path / "o", targets="mlp", **{"fit.iterations": 1})


def test_converted_checkpoint_is_not_converted_again(checkpoints, tmp_path):
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **{"fit.iterations": 1})
    with pytest.raises(CheckpointError, match="already converted"):
        spmconvert.convert(tmp_path / "o", tmp_path / "p")


def test_checkpoint_without_the_base_model_prefix(checkpoints, text, tmp_path):
    """Older checkpoints of GPT-2 name their tensors without ``transformer.``."""
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(checkpoints["gpt2"], source)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    spmconvert.convert(source, tmp_path / "a", calib=text, **QUICK)
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "b", calib=text, **QUICK)
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        a, b = (spmconvert.load(tmp_path / name).eval()(ids).logits for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert "h.0.mlp.c_fc.spm.scale_in" in file.keys()  # noqa: SIM118


def test_output_must_not_be_the_source(checkpoints):
    with pytest.raises(OptionError, match="is the source"):
        spmconvert.convert(checkpoints["gpt2"], checkpoints["gpt2"], force=True)


def test_existing_output_needs_force(checkpoints, tmp_path):
    options = {"fit.iterations": 1}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    with pytest.raises(OutputError, match="--force"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", force=True, stages=2, **options)
    assert spmconvert.load(tmp_path / "o").transformer.h[0].mlp.c_fc.spm.geometry.stages == 2


def test_device_that_is_not_there(checkpoints, tmp_path):
    # which no machine has
    with pytest.raises(BackendError, match="--device cpu"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", device="cuda:99")
    assert not (tmp_path / "o").exists()


def test_recipe_object_and_changes_contradict(checkpoints, tmp_path):
    with pytest.raises(OptionError, match="both given"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", recipe=Recipe(), stages=3)


def test_calibration_without_tokenizer(checkpoints, text, tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(checkpoints["gpt2"], source)
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(CalibrationError, match="tokenizer"):
        spmconvert.convert(source, tmp_path / "o", calib=text)


def test_public_names():
    assert spmconvert.__all__ == [
        "SPMConfig",
        "SPMLinear",
        "__version__",
        "convert",
        "export",
        "finetune",
        "fit_linear",
        "load",
        "quantize_",
        "report",
        "swap_",
        "verify",
    ]
    for name in spmconvert.__all__:
        assert getattr(spmconvert, name) is not None
    with pytest.raises(AttributeError):
        _ = spmconvert.nothing


def test_a_dataset_calibrates_as_its_text_does(checkpoints, text, tmp_path, monkeypatch, run):
    import datasets

    rows = datasets.Dataset.from_dict({"text": text.read_text().splitlines()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or rows)
    changes = {"rank": 2, **QUICK}
    name = "datasets:owner/name:part:validation"
    by_name = spmconvert.convert(checkpoints["gpt2"], tmp_path / "name", calib=name, **changes)
    by_file = spmconvert.convert(checkpoints["gpt2"], tmp_path / "file", calib=text, **changes)
    assert asked[0] == (("owner/name", "part"), {"split": "validation"})
    assert raw_tensors(tmp_path / "name") == raw_tensors(tmp_path / "file")
    assert by_name.held_out_rows == by_file.held_out_rows
    recorded = json.loads((tmp_path / "name" / "spm.json").read_text())
    assert recorded["recipe"]["calibration"]["file"] == name
    (tmp_path / "r.toml").write_text(
        f'[calibration]\nfile = "{name}"\nrows = 24\n[fit]\niterations = 8\nrefine = 0\n[design]\nrank = 2\n'
    )
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "recipe", recipe=tmp_path / "r.toml")
    assert raw_tensors(tmp_path / "recipe") == raw_tensors(tmp_path / "name")
    # its unseen rows measure, and it can be measured for a budget
    found = spmconvert.report(tmp_path / "name", data=name, baselines=True, seconds=0, rows=4)
    assert "rows that the conversion did not use; it fitted 24" in found.quality[0].rows_from
    assert [candidate.key for candidate in found.candidates][:4] == ["dense", "spm", "svd", "2:4"]
    quick = [f"--set={key}={value}" for key, value in {**QUICK, "budget.iterations": 2}.items()]
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "keep", "--calib", name, "--keep", "0.5", *quick]
    assert run(*command, "--structures", "lowrank", "--allow-slower")[0] == 0
    assert run(*command, "--structures", "lowrank", "--allow-slower", "--dry-run")[0] == 0
