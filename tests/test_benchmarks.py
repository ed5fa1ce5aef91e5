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


def run(module, *arguments):
    # two threads on a busy machine wait for each other longer than they work
    threads = [] if module in ("teacher", "distillation_memory") else ["--threads", "1"]
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments), *threads]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_distillation(text, tmp_path):
    sizes = ["--width", 64, "--layers", 1, "--steps", 2, "--batch-size", 2]
    run("teacher", "--text", text, "--output", tmp_path / "t", *sizes)
    arguments = [
        "--model",
        tmp_path / "t",
        "--train",
        text,
        "--evaluate",
        text,
        "--keep",
        0.5,
        "--steps",
        2,
        "--rates",
        1e-3,
    ]
    arguments += ["--structures", "whitened SVD", "wide blocks + companion", "--batch-size", 2, "--evaluation-rows", 4]
    out = run("distillation", *arguments, "--work", tmp_path / "w", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["structure"] for row in result["rows"]] == ["whitened SVD", "wide blocks + companion"]
    for row in result["rows"]:
        assert row["kept"] <= 0.5
        share = (row["converted"] - row["finetuned"]) / (row["converted"] - result["teacher_loss"])
        assert row["gap_closed"] == share
    assert "gap closed" in out


def test_step_time_and_memory(tmp_path):
    arguments = ["--widths", 64, "--layers", 1, "--rows", 1, "--tokens", 8, "--repetitions", 2]
    assert "dense/converted" in run("step_time", *arguments, "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["dense/converted"] == row["dense"]["p50"] / row["converted"]["p50"]
    run("distillation_memory", "--features", 8, "--vocabularies", 2000, "--tokens", 600, "--json", tmp_path / "m.json")
    row = json.loads((tmp_path / "m.json").read_text())["rows"][0]
    assert row["plain"]["gradient"] > 0


def test_byte_tokenizer_is_exact():
    from benchmarks.teacher import byte_tokenizer

    tokenizer = byte_tokenizer()
    words = "Hello, wörld — 12\n\tnaïve 日本"
    ids = tokenizer(words)["input_ids"]
    assert ids == list(words.encode())
    assert tokenizer.decode(ids) == words
