"""The benchmarks run, at sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_operator_refuses_a_device_that_is_not_there():
    command = [sys.executable, BENCHMARKS / "operator.py", "--device", "cuda"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
