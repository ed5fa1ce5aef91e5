"""The benchmarks run, at sizes that take no time."""

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2LMHeadModel

import spmconvert
from spmconvert.operator.linear import SPMLinear
from tests.conftest import gpt2_config
from tests.support import QUICK

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Triton kernels are interpreted where the variable is set before they are imported
INTERPRETED = """
import importlib, json, sys
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    importlib.import_module(f"benchmarks.{module}").main()
"""


@pytest.fixture
def run(monkeypatch):
    """Run a benchmark in this process; returns what it printed."""
    threads = torch.get_num_threads()

    def call(module, *arguments):
        # two threads on a busy machine wait for each other longer than they work
        one_thread = [] if module in ("teacher", "distillation_memory") else ["--threads", "1"]
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments), *one_thread])
        with redirect_stdout(io.StringIO()) as printed:
            importlib.import_module(f"benchmarks.{module}").main()
        return printed.getvalue()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Output and results of the benchmarks that compare Triton, in one process that interprets its kernels."""
    place = tmp_path_factory.mktemp("interpreted")
    options = {
        "operator": ["--rotate", "--shapes", "12x12", "--tokens", "1", "--seconds", "0"],
        "fit_time": ["--shape", "12x14", "--backends", "merged,triton", "--iterations", "1"],
    }
    runs = [[name, *given, "--threads", "1", "--json", str(place / name)] for name, given in options.items()]
    command = [sys.executable, "-c", INTERPRETED, json.dumps(runs)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, {name: json.loads((place / name).read_text()) for name in options}


def test_operator(run, tmp_path):
    out = run("operator", "--shapes", "16x24,96x96", "--tokens", "1,5", "--seconds", 0, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert row["dense/merged"] == row["dense"]["p50"] / row["merged"]["p50"]
    assert set(result["environment"]) == {"device", "threads", "dtype", "torch", "date"}
    assert "96 x 96" in out


@pytest.mark.xdist_group("interpreted")
def test_operator_rotated(interpreted):
    out, results = interpreted
    forward, both = results["operator"]["rows"]
    # input, weights with bias, output; so small a layer is merged into one block
    assert forward["dense"]["floor_bytes"] == forward["triton"]["floor_bytes"] == 4 * (12 + 12 * 12 + 12 + 12)
    assert both["dense"]["floor_bytes"] == 4 * (5 * 12 + 3 * (12 * 12 + 12))
    for name in ("dense", "merged", "triton"):
        figures = forward[name]
        assert figures["copies"] >= 2
        assert figures["GB/s"] == pytest.approx(figures["floor_bytes"] / figures["p50"] / 1e6)
        assert figures["share_of_floor"] == pytest.approx(figures["GB/s"] / results["operator"]["copy_bandwidth_GB/s"])
    assert "12 x 12" in out


def test_bytes_that_a_pass_cannot_avoid():
    from benchmarks.rotation import floor_bytes

    layer, parameters = SPMLinear(80, 80), 80 * 2 * 7 + 3 * 80
    # the merged blocks of 80 = 10 x 8 coordinates are 80 * 18 numbers, which only inference keeps
    assert floor_bytes(layer, (80, 80), 3, 4, backward=False) == 4 * (3 * 160 + 80 * 18 + 80)
    assert floor_bytes(layer, (80, 80), 3, 2, backward=True) == 2 * (3 * 5 * 80 + 3 * parameters)
    assert floor_bytes(torch.nn.Linear(80, 96), (80, 96), 3, 4, backward=False) == 4 * (3 * 176 + 80 * 96 + 96)


# later versions of transformers have another name for the cache
@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
def test_end_to_end(run, tmp_path):
    run("endtoend", "--tiny", "--samples", 1, "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["model"], row["backend"]) for row in rows] == [
        (model, backend) for model in ("gpt2-medium", "llama-1b") for backend in ("dense", "merged")
    ]
    for dense, merged in (rows[:2], rows[2:]):
        assert merged["parameters"] < dense["parameters"]
        for phase in ("prefill", "decode", "training"):
            assert dense[phase] > 0
            assert merged[f"{phase}/dense"] == merged[phase] / dense[phase]


@pytest.mark.parametrize("script", ["operator.py", "endtoend.py"])
def test_scripts_refuse_a_device_that_is_not_there(script):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / script, "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_batched_fit(run, tmp_path):
    options = ["--device", "cpu", "--shape", "12x20", "--members", 2, "--iterations", 8]
    printed = run("batched_fit", *options, "--json", tmp_path / "result.json")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["error apart"] <= max(1e-4, 10 * row["error apart by rounding"])
        assert row["single/batch"] > 0
    assert "single/batch" in printed


@pytest.mark.xdist_group("interpreted")
def test_fit_time(interpreted):
    out, results = interpreted
    assert "merged/this" in out
    merged, triton = results["fit_time"]["rows"]
    assert (merged["backend"], triton["backend"]) == ("merged", "triton")
    assert triton["merged/this"] == merged["seconds"] / triton["seconds"]
    assert triton["seconds"] > 5 * merged["seconds"], "kernels were interpreted"
    assert 0 < triton["fitted_error"] < 1
    for error in ("fitted_error", "held_out_error"):
        assert triton[error] == pytest.approx(merged[error], rel=1e-3)


def test_quality(run, text, tmp_path, monkeypatch):
    import benchmarks.quality

    monkeypatch.setattr(benchmarks.quality, "TIMED_SECONDS", 0.0)
    sizes = ["--width", 64, "--layers", 3, "--steps", 2, "--batch-size", 2]
    run("teacher", "--text", text, "--output", tmp_path / "t", *sizes)
    methods = ["whitened SVD", "wide blocks + companion", "Monarch", "magnitude 2:4", "drop blocks", "keep, low rank"]
    out = run(
        "quality", "--model", tmp_path / "t", "--calibration", text, "--evaluate", text, "--keep", 0.5, "--steps", 1,
        "--rates", 1e-3, "--methods", *methods, "--batch-size", 2, "--evaluation-rows", 4, "--calibration-rows", 16,
        "--work", tmp_path / "w", "--json", tmp_path / "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["rows"]
    assert 0 < result["left_by_half_rank"] < 1
    assert [row["method"] for row in rows] == methods
    for row in rows:
        # of three blocks the middle one can go, with its attention
        assert (0 if row["method"] == "drop blocks" else 0.3) < row["kept"] <= 0.6
        assert row["after"] > 0
        assert min(row["divergence_before"], row["divergence_after"]) > 0
        assert row["time"] > 0
        assert row["layer_error"] is None if row["method"] == "drop blocks" else 0 < row["layer_error"] < 1
    assert "Monarch" in out


def test_quality_table_takes_the_rate_of_the_least_held_out_loss():
    from benchmarks.quality_table import show, summarise

    row = {"method": "keep", "keep": 0.1, "kept": 0.09, "before": 5.0}
    runs = [(0, 1e-3, 0.4, 4.6), (0, 3e-3, 0.3, 4.5), (0, 1e-2, 0.5, 4.1), (1, 3e-3, 0.3, 4.3)]
    rows = [{**row, "seed": s, "rate": r, "held_out_loss": loss, "after": after} for s, r, loss, after in runs]
    rows[1]["divergence_after"] = 0.2
    (found,) = summarise(rows)
    assert (found.rate, found.tried, found.after) == (3e-3, (1e-3, 3e-3, 1e-2), (4.5, 4.3))
    assert (found.mean, found.spread, found.divergence) == (pytest.approx(4.4), pytest.approx(0.1), 0.2)
    show({"environment": {}, "dense_score": 4.0, "rows": [*rows, {**row, "method": "whitened SVD"}]})


def test_masked_weights_stay_zero():
    from benchmarks.sparse import MaskedLinear

    layer = MaskedLinear(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    layer(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()
    assert (layer.weight != 0).tolist() == [[True, False], [False, True]]


def test_monarch_projection_recovers_its_own_kind():
    from benchmarks.common import Layer
    from benchmarks.monarch import MonarchLinear
    from spmconvert.calibrate.statistics import ActivationStatistics

    torch.manual_seed(0)
    # 2 blocks and 2 groups, which other shapes of as many parameters or more cannot be
    planted = MonarchLinear(torch.randn(2, 2, 8), torch.randn(2, 12, 2), torch.zeros(24))
    weight = planted(torch.eye(16)).detach().t()
    moments = ActivationStatistics.isotropic(16)
    layer = Layer("planted", weight, torch.zeros(24), moments, moments)
    found = MonarchLinear.of(layer, keep=(4 * 16 + 1 * 24) / weight.numel())
    assert found.inner.shape == planted.inner.shape
    x = torch.randn(5, 16)
    torch.testing.assert_close(found(x), planted(x), rtol=1e-4, atol=1e-4)


def test_monarch_factors_one_after_the_other_are_their_product():
    from benchmarks.monarch import MonarchLinear

    torch.manual_seed(0)
    layer = MonarchLinear(torch.randn(4, 2, 4), torch.randn(2, 12, 4), torch.randn(24))
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), x @ layer.matrix().t() + layer.bias)


def test_blocks_that_do_not_fit_are_no_plain_stages():
    from benchmarks.common import blocks_only
    from spmconvert.errors import OptionError

    assert blocks_only(256, 1024, 0.25).term("spm").block == 2
    with pytest.raises(OptionError, match=r"no pass of blocks fits into 10% of 256 x 1024"):
        blocks_only(256, 1024, 0.1)


def test_a_teacher_that_remembers_answers_as_the_teacher():
    from benchmarks.common import remembering

    model = GPT2LMHeadModel(gpt2_config()).eval()
    again, calls = remembering(model), []
    again.base_model.h[0].register_forward_hook(lambda *_: calls.append(1))
    for ids in (torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]]), torch.tensor([[1, 2, 3]])):
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(calls) == 2


def test_experts(run, text, tmp_path):
    sizes = ["--architecture", "mixture", "--width", 64, "--layers", 2, "--steps", 2, "--batch-size", 2]
    run("teacher", "--text", text, "--output", tmp_path / "t", *sizes)
    run(
        "experts", "--model", tmp_path / "t", "--calibration", text, "--evaluate", text, "--keep", 0.5,
        "--calibration-rows", 16, "--evaluation-rows", 4, "--json", tmp_path / "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert 0 <= result["routing"]["fewest"] <= 1 <= result["routing"]["most"]
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert 0 < row["kept"] <= 0.5
        assert row["score"] > 0


def test_stacked(run, tmp_path, monkeypatch):
    import benchmarks.stacked

    monkeypatch.setattr(benchmarks.stacked, "SECONDS", 0.0)
    sizes = ["--experts", 4, "--chosen", 2, "--width", 64, "--inner", 64, "--tokens", 1, 8]
    run("stacked", *sizes, "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["structure"], row["tokens"]) for row in rows] == [
        (structure, tokens) for structure in ("low rank", "stages") for tokens in (1, 8)
    ]
    assert all(row["together"] > 0 for row in rows)


def test_recurrence(run, text, tmp_path, monkeypatch):
    import benchmarks.recurrence

    monkeypatch.setattr(benchmarks.recurrence, "TIMED_SECONDS", 0.0)
    run("recurrence", "--text", text, "--widths", 128, "--steps", 2, "--json", tmp_path / "r.json")
    rows = {row["structure"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["dense"]["loss"] == pytest.approx(rows["torch's LSTM"]["loss"], abs=1e-3)
    assert rows["one pass"]["kept"] < rows["low rank, 25%"]["kept"] < rows["low rank, 50%"]["kept"] < 1


def test_step_time(run, tmp_path):
    arguments = ["--widths", 64, "--layers", 1, "--rows", 1, "--tokens", 8, "--repetitions", 2]
    assert "dense/converted" in run("step_time", *arguments, "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["dense/converted"] == row["dense"]["p50"] / row["converted"]["p50"]


def test_distillation_memory(run, tmp_path, monkeypatch):
    commands = []

    def in_this_process(command, **_):
        commands.append(command[:5])
        figures = json.loads(run("distillation_memory", *command[3:]))
        # without a process of its own the memory means nothing
        return SimpleNamespace(stdout=json.dumps({**figures, "peak_bytes": 1 + len(commands)}))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    run("distillation_memory", "--features", 8, "--vocabularies", 2000, "--tokens", 600, "--json", tmp_path / "m.json")
    module = [sys.executable, "-m", "benchmarks.distillation_memory"]
    assert commands == [[*module, "--form", form] for form in ("plain", "chunked")]
    row = json.loads((tmp_path / "m.json").read_text())["rows"][0]
    assert row["plain"]["gradient"] > 0
    assert row["plain/chunked"] == pytest.approx(2 / 3)
    assert row["chunked"]["gradient"] == pytest.approx(row["plain"]["gradient"], rel=1e-4)


def test_tokenizer_is_exact(text):
    from benchmarks.teacher import make_tokenizer

    tokenizer = make_tokenizer(text, 300)
    words = "Hello, wörld — 12\n\tnaïve 日本"
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words


def test_refinement(run, checkpoints, text, other_text, tmp_path, monkeypatch):
    from benchmarks import refinement

    monkeypatch.setattr(refinement, "WINDOW", 64)
    monkeypatch.setattr(refinement, "TIMED_SECONDS", 0.1)
    given = [
        "--calibration",
        text,
        "--evaluate",
        other_text,
        "--windows",
        2,
        "--keep",
        0.5,
        "--epochs",
        0,
        1,
        "--allow-slower",
    ]
    printed = run("refinement", checkpoints["llama"], *given, "--work", tmp_path / "work", "--json", tmp_path / "o.json")
    result = json.loads((tmp_path / "o.json").read_text())
    rows = [(row["method"], row["epochs"]) for row in result["rows"]]
    assert rows[:4] == [("svd", 0), ("svd", 1), ("keep", 0), ("keep", 1)]
    assert rows[4][0].startswith("drop blocks 1 to 1")
    assert all(0 < row["parameters"] < 1 and row["loss"] > 0 and row["faster"] > 0 for row in result["rows"])
    assert "above dense" in printed


def test_refinement_by_time(run, checkpoints, text, other_text, tmp_path, monkeypatch):
    from benchmarks import refinement

    monkeypatch.setattr(refinement, "WINDOW", 64)
    monkeypatch.setattr(refinement, "TIMED_SECONDS", 0.1)
    # times of models as small as these say nothing
    monkeypatch.setattr(refinement, "faster", lambda *_: 1.5)
    monkeypatch.setattr(refinement, "convert", lambda *given, **changes: made.append(changes) or convert(*given, **changes))
    made = []

    def convert(source, output, *, force, calib, speedup, tokens, targets, structures="sparse24,lowrank"):
        # as the tool does, by a share
        changes = {"targets": targets, "structures": structures, "keep": 0.5, "allow_slower": True, **QUICK}
        return spmconvert.convert(source, output, force=force, calib=calib, **changes)

    given = ["--calibration", text, "--evaluate", other_text, "--windows", 2, "--speedup", 1.2]
    printed = run("refinement", checkpoints["llama"], *given, "--work", tmp_path / "work", "--json", tmp_path / "o.json")
    result = json.loads((tmp_path / "o.json").read_text())
    assert [row["method"] for row in result["rows"]][:2] == ["keep", "low rank"]
    assert result["rows"][2]["method"].startswith("drop blocks 1 to 1")
    assert [one["speedup"] for one in made] == [1.2, 1.2]
    assert "1.2x" in printed
