"""Budgets of a whole conversion: bytes as they are written, and time, with clocks that are made up."""

import json
import math
import re

import pytest
from transformers.pytorch_utils import Conv1D

import spmconvert
from spmconvert.budget import speed, spend
from spmconvert.budget.times import TimeTable
from spmconvert.commands import convert as converting
from spmconvert.commands.bare import first_budget
from spmconvert.commands.convert import open_plan
from spmconvert.errors import OptionError, OutOfReachError, RecipeError
from spmconvert.model.architecture import load_config
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.sparse24 import Sparse24
from spmconvert.recipe.loading import recipe_from_keywords
from spmconvert.recipe.recipe import Recipe
from tests.commands.test_convert import StopAfter
from tests.support import QUICK, assert_refused, files_of, raw_tensors

BUDGET = {"budget.iterations": 2, **QUICK}


def written_bytes(directory, layers):
    """Bytes of all tensors of the layers in a checkpoint."""
    inside = tuple(f"{layer}." for layer in layers)
    return sum(len(content) for name, (_, content) in raw_tensors(directory).items() if name.startswith(inside))


def targeted(checkpoint):
    _, plan, _ = open_plan(str(checkpoint), Recipe())
    return plan.layers


def test_kept_bytes_are_those_of_the_tensors_that_are_written(checkpoints, text, tmp_path):
    layers = targeted(checkpoints["gpt2"])
    limit = int(0.6 * sum(layer.dense_bytes for layer in layers))
    options = {"keep_bytes": limit, "structures": "spm,sparse24,lowrank", "allow_slower": True, "calib": text, **BUDGET}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    found = written_bytes(tmp_path / "o", [layer.target.name for layer in layers])
    assert found == result.choice.cost <= limit == result.choice.limit
    assert sum(len(content) for _, content in raw_tensors(tmp_path / "o").values()) == result.bytes_after


@pytest.mark.parametrize("name", ["gpt2", "llama-bf16"])
def test_kept_bytes_count_positions_and_marks(checkpoints, text, tmp_path, name):
    layers, total = targeted(checkpoints[name]), 0
    for layer in layers:
        sizes = (layer.target.in_features, layer.target.out_features)
        values, positions = sizes[1] * 2 * math.ceil(sizes[0] / 4), sizes[1] * math.ceil(sizes[0] / 8)
        item = 2 if layer.stored_dtype == "bfloat16" else 4
        # the mark is one number
        total += item * (values + sizes[1] * layer.target.bias + 1) + positions
    options = {"structures": "sparse24", "allow_slower": True, "calib": text, **BUDGET}
    with pytest.raises(OptionError, match=f"{total:,}"):
        spmconvert.convert(checkpoints[name], tmp_path / "o", keep_bytes=total - 1, **options)
    spmconvert.convert(checkpoints[name], tmp_path / "o", keep_bytes=total, **options)
    assert written_bytes(tmp_path / "o", [layer.target.name for layer in layers]) == total


# seconds a multiplication takes, and seconds of what no design changes
UNIT, REST = 1e-6, 1e-3


def design_seconds(design):
    return UNIT * design.flops_per_token() / 2


class Clock:
    """Times from sizes alone; the first measurements of a converted model may come out slower than its layers say."""

    def __init__(self, slowdowns=()):
        self.slowdowns = list(slowdowns)
        self.measured = []

    def forward(self, models, budget, device, seconds=0.0):
        times = {}
        for name, model in models.items():
            layers = 0.0
            for path, module in model.named_modules():
                if isinstance(module, SPMLinear):
                    layers += design_seconds(module.design)
                elif ".mlp." in path and isinstance(module, Conv1D):
                    layers += UNIT * module.weight.numel()
            slowdown = self.slowdowns.pop(0) if name == "converted" and self.slowdowns else 1.0
            times[name] = REST + slowdown * layers
        self.measured.append(times)
        return times


def set_clock(monkeypatch, *slowdowns):
    """Make up all times."""
    clock = Clock(slowdowns)

    def timed(_, calls):
        return {name: [call if name == "dense" else design_seconds(call)] for name, call in calls.items()}

    # designs of layers as small as these are far apart
    monkeypatch.setattr(speed, "BEYOND", 1.05)
    monkeypatch.setattr(TimeTable, "_dense_call", lambda _, inputs, outputs: UNIT * inputs * outputs)
    monkeypatch.setattr(TimeTable, "_design_call", lambda _, design: design)
    monkeypatch.setattr(TimeTable, "_timed", timed)
    monkeypatch.setattr(speed, "forward_seconds", clock.forward)
    monkeypatch.setattr(converting, "forward_seconds", clock.forward)
    return clock


def test_a_speedup_is_reached_and_recorded(checkpoints, text, tmp_path, monkeypatch):
    clock = set_clock(monkeypatch)
    options = {"structures": "spm,lowrank", "calib": text, "speedup": 1.5, "tokens": 24, "rows": 2, **BUDGET}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    found = result.speed
    assert (found["rows"], found["tokens"], found["wanted"]) == (2, 24, 1.5)
    # a part of the time is lost to whole nanoseconds
    assert found["measured"] == pytest.approx(found["predicted"], rel=1e-4)
    assert found["measured"] >= 1.5
    assert json.loads((tmp_path / "o" / "spm.json").read_text())["speed"] == found
    assert result.choice.cost <= result.choice.limit
    # the dense model, the choice, and what was fitted
    assert [sorted(times) for times in clock.measured] == [
        ["dense", "rest"],
        ["converted", "dense"],
        ["converted", "dense"],
    ]
    # whatever is within the time and loses less is not left out: a smaller target loses less
    easier = spmconvert.convert(checkpoints["gpt2"], tmp_path / "e", **{**options, "speedup": 1.2})
    assert easier.choice.loss < result.choice.loss


def test_a_speedup_out_of_reach_names_the_largest(checkpoints, text, tmp_path, monkeypatch):
    set_clock(monkeypatch)
    options = {"structures": "lowrank", "calib": text, "tokens": 24, **BUDGET}
    with pytest.raises(OptionError, match=r"speedup 50 is out of reach") as refused:
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", speedup=50, **options)
    assert not (tmp_path / "o").exists()
    layers = targeted(checkpoints["gpt2"])
    dense = UNIT * sum(layer.target.in_features * layer.target.out_features for layer in layers)
    # rank one in every layer
    fastest = UNIT * sum(layer.target.in_features + layer.target.out_features for layer in layers)
    named = float(re.search(r"the model is ([\d.]+) times faster at 1 x 24 tokens", str(refused.value))[1])
    assert named == pytest.approx((REST + dense) / (REST + fastest), abs=0.005)
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", speedup=named - 0.01, **options)
    assert result.speed["measured"] >= named - 0.01


@pytest.mark.parametrize("size", ["keep", "keep_bytes", "keep_flops"])
def test_a_speedup_and_a_size_are_reached_at_once(checkpoints, text, tmp_path, monkeypatch, size):
    set_clock(monkeypatch)
    options = {"structures": "sparse24,lowrank", "calib": text, "speedup": 1.2, "tokens": 24, **BUDGET}
    alone = spmconvert.convert(checkpoints["gpt2"], tmp_path / "alone", **options)
    layers = targeted(checkpoints["gpt2"])
    # what is asked for is less than the speed-up leaves
    whole = {"keep": 1.0, "keep_flops": 1.0, "keep_bytes": sum(layer.dense_bytes for layer in layers)}[size]
    value = {"keep": 0.4, "keep_flops": 0.4, "keep_bytes": int(0.4 * whole)}[size]
    both = spmconvert.convert(checkpoints["gpt2"], tmp_path / "both", **{**options, size: value})
    assert both.speed["measured"] >= 1.2
    cost, limit = both.choice.beside
    assert cost <= limit
    assert alone.choice.loss < both.choice.loss
    recorded = json.loads((tmp_path / "both" / "spm.json").read_text())
    unit = {"keep": "parameters", "keep_bytes": "bytes", "keep_flops": "FLOPs a token"}[size]
    assert recorded["allocation"]["beside"] == {"cost": cost, "limit": limit, "unit": unit}
    assert f"{cost:,} {unit} of {limit:,}" in both.budget_note
    if size == "keep_bytes":
        kept = written_bytes(tmp_path / "both", [layer.target.name for layer in layers])
        assert kept == cost < written_bytes(tmp_path / "alone", [layer.target.name for layer in layers])


def test_a_size_beside_a_speedup_that_cannot_be_kept_is_refused_before_any_work(checkpoints, text, tmp_path, monkeypatch):
    set_clock(monkeypatch)
    options = {"structures": "lowrank", "calib": text, "tokens": 24, **BUDGET}
    with pytest.raises(OptionError, match="the budget is 9 bytes, the smallest candidates of all layers need"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", speedup=1.2, keep_bytes=9, **options)
    with pytest.raises(OptionError, match=r"keep_bytes allows 9,000,000 bytes, .* as they are; allow less"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", speedup=1.2, keep_bytes="9MB", **options)


def test_a_target_that_is_missed_twice_is_tightened_once(checkpoints, text, tmp_path, monkeypatch):
    clock = set_clock(monkeypatch, 1.2, 1.15)
    options = {"structures": "lowrank", "calib": text, "speedup": 1.5, "tokens": 24, **BUDGET}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    first, again, second = (times["dense"] / times["converted"] for times in clock.measured[1:4])
    assert first < again < 0.95 * 1.5
    assert second >= 1.5
    # then what was fitted is measured
    assert len(clock.measured) == 5
    assert result.speed["predicted"] == pytest.approx(1.5 * speed.AIM * min(1.5 / again, speed.TIGHTENING), rel=0.01)
    plain = set_clock(monkeypatch)
    untightened = spmconvert.convert(checkpoints["gpt2"], tmp_path / "p", **options)
    assert len(plain.measured) == 3
    assert result.choice.limit < untightened.choice.limit


def test_a_busy_machine_does_not_ruin_the_model(checkpoints, text, tmp_path, monkeypatch):
    clock = set_clock(monkeypatch, *[2.0] * 4)
    options = {"structures": "lowrank", "calib": text, "speedup": 1.2, "tokens": 24, **BUDGET}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    tried = [times for times in clock.measured if "converted" in times]
    assert len(tried) == 4
    assert result.speed["predicted"] < 1.2 * 1.15
    assert result.speed["wanted"] == 1.2
    assert result.speed["measured"] == tried[-1]["dense"] / tried[-1]["converted"]


def test_an_interrupted_run_for_a_speedup_goes_on_with_its_choice(checkpoints, text, tmp_path, monkeypatch):
    set_clock(monkeypatch)
    options = {"structures": "lowrank", "calib": text, "speedup": 1.5, "tokens": 24, **BUDGET}
    whole = spmconvert.convert(checkpoints["gpt2"], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "cut", progress=StopAfter(1), **options)
    clock = set_clock(monkeypatch)
    resumed = spmconvert.convert(checkpoints["gpt2"], tmp_path / "cut", resume=True, **options)
    assert raw_tensors(tmp_path / "cut") == raw_tensors(tmp_path / "whole")
    assert (resumed.choice, resumed.speed) == (whole.choice, whole.speed)
    assert len(clock.measured) == 1, "only what was fitted is measured again"


@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"keep_flops": 0.5}, {"keep_bytes": "20KB"}], ids=str)
def test_slower_designs_are_dropped_unless_they_are_allowed(checkpoints, text, tmp_path, monkeypatch, budget):
    set_clock(monkeypatch)
    slower = {"spm": 2.0, "lowrank": 0.5}

    def timed(_, calls):
        factors = {name: 1.0 if name == "dense" else slower[call.terms[0].kind] for name, call in calls.items()}
        return {name: [factor * calls["dense"]] for name, factor in factors.items()}

    monkeypatch.setattr(TimeTable, "_timed", timed)
    options = {"structures": "spm,lowrank", "calib": text, **budget, **BUDGET}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    assert all(record.design.startswith("rank ") for record in result.layers)
    slower["lowrank"] = 1.1
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OptionError, match=r"slower than the dense layers at 512 tokens.*--allow-slower"):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "p", allow_slower=True, **options)


def test_a_budget_that_only_slower_designs_keep_says_so(checkpoints, text, tmp_path, monkeypatch):
    set_clock(monkeypatch)
    layers = targeted(checkpoints["gpt2"])
    slow = layers[0].target

    def is_slow(_, design):
        # low rank of one shape
        return (design.in_features, design.out_features) == (slow.in_features, slow.out_features)

    monkeypatch.setattr(TimeTable, "is_slower", is_slow)
    options = {"structures": "lowrank", "calib": text, "keep": 0.2, **BUDGET}
    with pytest.raises(
        OptionError, match=r"[\d,]+ of [\d,]+ candidates are slower .* the others need at least .* --allow-slower"
    ):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", **options)
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", allow_slower=True, **options)


def test_a_dry_run_compares_speedups(checkpoints, text, tmp_path, monkeypatch, run):
    set_clock(monkeypatch)
    quick = [f"--set={key}={value}" for key, value in BUDGET.items()]
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", text, "--structures", "lowrank", *quick]
    command += ["--tokens", 24, "--rows", 1]
    assert_refused(run(*command, "--speedup", "1.2,1.5", "--dry-run"), OptionError, "not been made yet")
    code, out, _ = run(*command, "--speedup", "1.5")
    assert code == 0
    assert re.search(r"forward pass of 1 x 24 tokens on .*: 1\.\d+ times faster, 1\.\d+ by the times .*, 1\.5 wanted", out)
    code, out, _ = run(*command, "--speedup", "1.5,1.2,50", "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out)
    assert [row["speedup"] for row in planned["budgets"]] == [1.2, 1.5], "one is out of reach"
    assert planned["budgets"][0]["predicted_loss"] < planned["budgets"][1]["predicted_loss"]
    assert all(row["layers"].keys() <= {"lowrank", "dense"} for row in planned["budgets"])
    assert planned["recipe"]["budget"]["speedup"] == 1.5
    assert {term["kind"] for layer in planned["layers"] for term in layer["terms"]} == {"lowrank"}
    assert planned["allocation"]["unit"] == "nanoseconds"
    code, out, _ = run(*command, "--speedup", "1.2,1.5", "--dry-run")
    assert code == 0
    assert re.search(r"--speedup +predicted loss +layers +checkpoint", out)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("--speedup", "1.2,1.5"), OptionError, ("names 2 values", "--dry-run compares several")),
        (("--speedup", "fast"), OptionError, ("'fast' is no number",)),
        (("--speedup", "1"), RecipeError, ("--speedup 1.0 is not above 1",)),
        (("--speedup", "1.5", "--max-error", "0.5"), RecipeError, ("at once", "speedup beside one of keep, keep_bytes")),
        (("--keep", "0.5", "--keep-bytes", "9MB"), RecipeError, ("keep and keep_bytes are given at once",)),
        (("--keep", "0.5", "--keep-bytes", "9MB", "--speedup", "1.5"), RecipeError, ("given at once",)),
        (("--speedup", "1.5", "--stages", "3"), RecipeError, ("speedup chooses the design",)),
        (("--speedup", "1.5", "--tokens", "0"), RecipeError, ("--tokens 0 is below 1",)),
        (("--tokens", "64"), RecipeError, ("budget.tokens is given without a budget",)),
        (("--allow-slower",), RecipeError, ("budget.allow_slower is given without a budget",)),
        (("--keep", "0.5", "--structures", "dense"), RecipeError, ("dense is no kind of term", "sparse24")),
        (("--keep", "0.5", "--structures", ""), OptionError, ("--structures is empty",)),
    ],
)
def test_budgets_that_make_no_sense_are_refused(run, checkpoints, tmp_path, options, error, words):
    assert_refused(run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", *options), error, *words)


def test_an_unneeded_design_has_no_time(monkeypatch):
    # on a CPU 2:4 is the dense product, so a difference would be noise
    set_clock(monkeypatch)
    table = TimeTable(24)
    assert table.seconds(Design(32, 96, (Sparse24(32, 96),))) == table.dense(32, 96) == UNIT * 32 * 96


def test_where_the_first_budget_is_out_of_reach_size_alone_is_saved(monkeypatch, checkpoints, text, tmp_path):
    """A model too small to become faster; a run that was stopped after the choice goes on with the same."""

    def refuse(*_):
        raise OutOfReachError("speedup 1.2 is out of reach")

    monkeypatch.setattr(spend, "check_speedup", refuse)
    options = {"bare": True, "calib": text, "targets": "mlp", **QUICK}
    spmconvert.convert(checkpoints["llama"], tmp_path / "whole", **options)
    recorded = json.loads((tmp_path / "whole" / "spm.json").read_text())
    assert recorded["recipe"]["budget"]["keep"] == 0.5
    assert recorded["recipe"]["budget"]["allow_slower"]
    assert recorded["recipe"]["budget"]["speedup"] is None
    assert recorded["parameters"]["after"] < recorded["parameters"]["before"]
    with monkeypatch.context() as stopped:
        stopped.setattr("spmconvert.commands.convert.fit_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            spmconvert.convert(checkpoints["llama"], tmp_path / "parts", **options)
    spmconvert.convert(checkpoints["llama"], tmp_path / "parts", resume=True, **options)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    with pytest.raises(OutOfReachError):
        spmconvert.convert(checkpoints["llama"], tmp_path / "o", speedup=1.2, **{**options, "bare": False})


@pytest.mark.parametrize(("name", "speedup"), [("gpt2", 1.15), ("bert", 1.2)])
def test_a_first_try_asks_models_of_language_for_less(checkpoints, text, name, speedup):
    recipe = recipe_from_keywords({"calib": text})
    assert first_budget(recipe, load_config(checkpoints[name])).speedup == speedup
    assert first_budget(recipe_from_keywords({"calib": text, "rank": 2}), load_config(checkpoints[name])) is None
