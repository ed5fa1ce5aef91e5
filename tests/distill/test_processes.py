"""Two gloo processes end with the same parameters as one, replicated or sharded."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

import spmconvert
from spmconvert.commands.finetune import finetune
from spmconvert.errors import OptionError

OPTIONS = {"steps": 6, "batch_size": 6, "block_size": 32}
SETTINGS = ["evaluate_every=3", "save_every=4"]


def start(arguments, *, launcher=()):
    # a torch that sees one thread a process, and no proxy between the processes
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher or ["-m", "spmconvert"]), "finetune", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("how", ["replicated", "sharded", "accelerate"])
def test_two_processes_equal_one(converted, text, tmp_path, how):
    settings = dict(item.split("=") for item in SETTINGS)
    finetune(converted["gpt2"], tmp_path / "one", data=text, **OPTIONS, **{k: int(v) for k, v in settings.items()})
    arguments = [converted["gpt2"], "-o", tmp_path / "two", "--data", text, "--steps", 6, "--batch-size", 6]
    arguments += ["--block-size", 32, *(part for item in SETTINGS for part in ("--set", item))]
    if how == "accelerate":
        module = "accelerate.commands.launch"
        launcher = ["-m", module, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        found = start(arguments, launcher=[*launcher, "--dynamo_backend", "no", "-m", "spmconvert"])
    else:
        found = start([*arguments, "--num-processes", 2, *(["--shard"] if how == "sharded" else [])])
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("KL to the source's words") == 1, "one process speaks"
    one, two = (spmconvert.load(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, expected in one.items():
        difference = (two[name] - expected).abs().max()
        # Adam divides by the gradient's own size, so rounding shows where gradients are nearly zero
        assert difference <= 1e-4 * expected.abs().max() + 1e-5, name
    records = [json.loads((tmp_path / name / "spm.json").read_text())["finetune"][0] for name in ("one", "two")]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["history"][0]["held_out_loss"] == pytest.approx(records[1]["history"][0]["held_out_loss"], rel=1e-5)


def test_parameters_that_no_loss_reaches_are_left_as_they_are(converted, text, tmp_path):
    arguments = [converted["bert"], "-o", tmp_path / "o", "--data", text, "--batch-size", 4, "--block-size", 32]
    found = start([*arguments, "--steps", 2, "--train", "all", "--num-processes", 2])
    assert found.returncode == 0, found.stderr
    before, after = (spmconvert.load(place).state_dict() for place in (converted["bert"], tmp_path / "o"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= same
    assert len(same) < len(before)


def test_resume_when_sharded(converted, text, tmp_path):
    arguments = [converted["gpt2"], "--data", text, "--batch-size", 4, "--block-size", 32, "--steps", 6, "--shard"]
    arguments += ["--num-processes", 2, "--set", "save_every=2", "--set", "evaluate_every=6"]
    assert start([*arguments, "-o", tmp_path / "whole"]).returncode == 0
    partial = tmp_path / ".cut.partial"
    process = subprocess.Popen(
        [sys.executable, "-m", "spmconvert", "finetune", *map(str, [*arguments, "-o", tmp_path / "cut"])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (partial / "state.bin").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.communicate()
    resumed = start([*arguments, "-o", tmp_path / "cut", "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    whole, cut = (spmconvert.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all((whole[name] - cut[name]).abs().max() < 1e-6 for name in whole)


def test_too_few_rows_for_the_processes(converted, text, tmp_path):
    found = start([converted["gpt2"], "-o", tmp_path / "o", "--data", text, "--batch-size", 1, "--num-processes", 2])
    assert found.returncode == OptionError.exit_code, found.stderr
    assert "batch_size is 1, 2 processes" in found.stderr
    assert "Traceback" not in found.stderr
