"""The benchmarks run, at sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import gpt2_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_operator(tmp_path):
    command = [sys.executable, BENCHMARKS / "operator.py", "--shapes", "16x24,96x96", "--tokens", "1,5", "--seconds", "0"]
    run = subprocess.run([*command, "--json", tmp_path / "r.json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert row["dense/merged"] == row["dense"]["p50"] / row["merged"]["p50"]
    assert set(result["environment"]) == {"device", "threads", "dtype", "torch", "date"}
    assert "96 x 96" in run.stdout


def test_operator_rotated(tmp_path):
    command = [sys.executable, BENCHMARKS / "operator.py", "--rotate", "--shapes", "80x80", "--tokens", "1"]
    run = subprocess.run(
        [*command, "--seconds", "0", "--threads", "1", "--json", tmp_path / "r.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    forward, both = result["rows"]
    # input, weights with bias, output; the merged blocks of 80 = 10 x 8 coordinates are 80 * 18 numbers
    assert forward["dense"]["floor_bytes"] == 4 * (80 + 80 * 80 + 80 + 80)
    assert forward["triton"]["floor_bytes"] == 4 * (80 + 80 * 18 + 80 + 80)
    assert both["dense"]["floor_bytes"] == 4 * (5 * 80 + 3 * (80 * 80 + 80))
    for name in ("dense", "merged", "triton"):
        figures = forward[name]
        assert figures["copies"] >= 2
        assert figures["GB/s"] == pytest.approx(figures["floor_bytes"] / figures["p50"] / 1e6)
        assert figures["share_of_floor"] == pytest.approx(figures["GB/s"] / result["copy_bandwidth_GB/s"])
    assert "80 x 80" in run.stdout


def test_end_to_end(tmp_path):
    command = [sys.executable, BENCHMARKS / "endtoend.py", "--tiny", "--threads", "1", "--samples", "1"]
    run = subprocess.run([*command, "--json", tmp_path / "r.json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["model"], row["backend"]) for row in rows] == [
        (model, backend) for model in ("gpt2-medium", "llama-1b") for backend in ("dense", "merged")
    ]
    for dense, merged in (rows[:2], rows[2:]):
        assert merged["parameters"] < dense["parameters"]
        for phase in ("prefill", "decode", "training"):
            assert dense[phase] > 0
            assert merged[f"{phase}/dense"] == merged[phase] / dense[phase]


def test_operator_refuses_a_device_that_is_not_there():
    command = [sys.executable, BENCHMARKS / "operator.py", "--device", "cuda"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr


def test_fit_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--shape", "66x70", "--backends", "merged,triton", "--iterations", 1]
    assert "merged/this" in run("fit_time", *arguments, "--json", tmp_path / "r.json")
    merged, triton = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (merged["backend"], triton["backend"]) == ("merged", "triton")
    assert triton["merged/this"] == merged["seconds"] / triton["seconds"]
    assert 0 < triton["fitted_error"] < 1
    for error in ("fitted_error", "held_out_error"):
        assert triton[error] == pytest.approx(merged[error], rel=1e-3)


def run(module, *arguments):
    # two threads on a busy machine wait for each other longer than they work
    threads = [] if module in ("teacher", "distillation_memory") else ["--threads", "1"]
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments), *threads]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_quality(text, tmp_path):
    sizes = ["--width", 64, "--layers", 1, "--steps", 2, "--batch-size", 2]
    run("teacher", "--text", text, "--output", tmp_path / "t", *sizes)
    methods = ["whitened SVD", "wide blocks + companion", "Monarch", "magnitude 2:4", "keep, low rank"]
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
        assert 0.3 < row["kept"] <= 0.5
        assert row["after"] > 0
        assert min(row["divergence_before"], row["divergence_after"]) > 0
        assert row["time"] > 0
        assert 0 < row["layer_error"] < 1
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

    assert blocks_only(256, 1024, 0.25).block == 2
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


def test_step_time_and_memory(tmp_path):
    arguments = ["--widths", 64, "--layers", 1, "--rows", 1, "--tokens", 8, "--repetitions", 2]
    assert "dense/converted" in run("step_time", *arguments, "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["dense/converted"] == row["dense"]["p50"] / row["converted"]["p50"]
    run("distillation_memory", "--features", 8, "--vocabularies", 2000, "--tokens", 600, "--json", tmp_path / "m.json")
    row = json.loads((tmp_path / "m.json").read_text())["rows"][0]
    assert row["plain"]["gradient"] > 0


def test_tokenizer_is_exact(text):
    from benchmarks.teacher import make_tokenizer

    tokenizer = make_tokenizer(text, 300)
    words = "Hello, wörld — 12\n\tnaïve 日本"
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
