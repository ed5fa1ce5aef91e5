"""The benchmarks run, at sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
