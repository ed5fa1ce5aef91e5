"""A conversion by several processes: the bytes of one, whatever they divide."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.support import files_of

# one worker runs them all, so that processes do not crowd each other
pytestmark = pytest.mark.xdist_group("processes")


def start(source, place, count, *options):
    """One conversion, with a cache of its own."""
    command = [sys.executable, "-m", "spmconvert", "convert", source, "-o", place / "out", "--no-measure", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "SPMCONVERT_CACHE": str(place / "cache")}
    arguments = list(map(str, [*command, "--num-processes", count]))
    return subprocess.Popen(arguments, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # moments, low rank, responses and candidates are divided, fits are made by the first one
        ("llama", ["--keep", "0.4", "--allow-slower"]),
        # an encoder, whose rows have several lengths; fits are divided, too
        ("bert", ["--keep", "0.4", "--allow-slower", "--independent", "--refine", "0", "--structures", "monarch,lowrank"]),
    ],
)
def test_several_processes_give_the_bytes_of_one(checkpoints, text, tmp_path, name, options):
    given = [*options, "--calib", text, "--set", "calibration.rows=40"]
    printed = {count: finish(start(checkpoints[name], tmp_path / str(count), count, *given)) for count in (1, 3)}
    assert files_of(tmp_path / "1" / "out") == files_of(tmp_path / "3" / "out")
    # one of them speaks
    assert printed[3].count("in x out") == 1


def test_killed_processes_are_resumed(checkpoints, text, tmp_path):
    options = ["--keep", "0.4", "--allow-slower", "--calib", text, "--set", "calibration.rows=40"]
    finish(start(checkpoints["llama"], tmp_path / "whole", 1, *options))
    process = start(checkpoints["llama"], tmp_path / "cut", 2, *options)
    layers, deadline = tmp_path / "cut" / ".out.partial" / "layers", time.monotonic() + 120
    while not list(layers.glob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / "cut" / "out").exists()
    finish(start(checkpoints["llama"], tmp_path / "cut", 2, *options, "--resume"))
    assert files_of(tmp_path / "cut" / "out") == files_of(tmp_path / "whole" / "out")


def test_an_error_of_one_is_one_line(checkpoints, text, tmp_path):
    process = start(checkpoints["gpt2"], tmp_path, 2, "--rank", "4", "--calib", text, "--device", "cuda")
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.count("error:") == 1
    assert "Traceback" not in error
