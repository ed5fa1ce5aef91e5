"""Two gloo processes end with the same parameters as one, replicated or sharded, and a sharded run resumes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import spmconvert
from spmconvert.commands.finetune import finetune
from spmconvert.errors import OptionError
from tests.support import files_of

# one worker runs them all, so that the processes are started once
pytestmark = pytest.mark.xdist_group("processes")
OPTIONS = {"steps": 6, "batch_size": 6, "block_size": 32, "evaluate_every": 3, "save_every": 2, "precision": "fp32"}
# what accelerate's launcher runs where there are GPUs; on CPUs it would start a single process
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.distill.session"]
# a torch that sees one thread a process
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
START = {"env": ENVIRONMENT, "cwd": Path(__file__).parents[2], "text": True}


def command(model, output, text, *more, **changes):
    settings = [f"--set={key}={value}" for key, value in {**OPTIONS, **changes}.items()]
    return ["finetune", *map(str, (model, "-o", output, "--data", text)), *more, *settings]


@pytest.fixture(scope="module")
def session(converted, text, tmp_path_factory):
    """What two processes of another launcher printed and wrote; the last of their runs was killed."""
    place = tmp_path_factory.mktemp("session")
    gpt2 = converted["gpt2"]
    commands = [
        command(gpt2, place / "replicated", text),
        command(gpt2, place / "sharded", text, "--shard"),
        command(converted["bert"], place / "unreached", text, "--train", "all", batch_size=4, steps=2),
        command(gpt2, place / "small", text, batch_size=1),
        command(gpt2, place / "cut", text, "--shard"),
    ]
    process = subprocess.Popen(
        [sys.executable, *LAUNCHER, json.dumps(commands)], **START, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not (place / ".cut.partial" / "state.bin").exists():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    out, _ = process.communicate()
    assert not (place / "cut").exists()
    return place, out


@pytest.fixture(scope="module")
def alone(converted, text, tmp_path_factory):
    """The same finetune by one process."""
    place = tmp_path_factory.mktemp("alone") / "one"
    finetune(converted["gpt2"], place, data=text, **OPTIONS)
    return place


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_two_processes_equal_one(session, alone, how):
    place, _ = session
    one, two = (spmconvert.load(directory).state_dict() for directory in (alone, place / how))
    for name, expected in one.items():
        difference = (two[name] - expected).abs().max()
        # Adam divides by the gradient's own size, so rounding shows where gradients are nearly zero
        assert difference <= 1e-4 * expected.abs().max() + 1e-5, name
    records = [json.loads((directory / "spm.json").read_text())["finetune"][0] for directory in (alone, place / how)]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["history"][0]["held_out_loss"] == pytest.approx(records[1]["history"][0]["held_out_loss"], rel=1e-5)


def test_one_process_speaks(session):
    _, out = session
    # of the two runs that match words and ended; the third matches states
    assert out.count("KL to the source's words") == 2


def test_parameters_that_no_loss_reaches_are_left_as_they_are(session, converted):
    before, after = (spmconvert.load(place).state_dict() for place in (converted["bert"], session[0] / "unreached"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= same
    assert len(same) < len(before)


def test_too_few_rows_for_the_processes(session):
    place, out = session
    for rank in (0, 1):
        codes = [int(line.split()[-1]) for line in out.splitlines() if line.startswith(f"process {rank} ended")]
        assert codes == [0, 0, 0, OptionError.exit_code]
    assert not (place / "small").exists()


def test_a_killed_run_resumes_when_sharded(session, converted, text):
    place, _ = session
    arguments = command(converted["gpt2"], place / "cut", text, "--shard", "--num-processes", "2", "--resume")
    resumed = subprocess.run(
        [sys.executable, "-m", "spmconvert", *arguments], **START, capture_output=True, check=False, timeout=240
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("KL to the source's words") == 1
    whole, cut = (spmconvert.load(place / name).state_dict() for name in ("sharded", "cut"))
    assert all((whole[name] - cut[name]).abs().max() < 1e-6 for name in whole)
    assert files_of(place / "sharded").keys() == files_of(place / "cut").keys()
    steps = [json.loads(line)["step"] for line in (place / "cut.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4, 5, 6], "each once, though some were taken before"
