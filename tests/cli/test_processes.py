"""The launcher of several processes: one of them speaks, and the first that fails has the last word."""

import json
import os
import subprocess
import sys
import time

import pytest

from spmconvert.cli.processes import run_in_processes

# stands in for ``python -m spmconvert``: says which of the processes it is and ends as it is told to
STANDS_IN = """
import json, os, sys, time
rank = int(os.environ["RANK"])
print(f"process {rank} of {os.environ['WORLD_SIZE']}: {' '.join(sys.argv[1:])}", file=sys.stderr)
seconds, code = json.loads(os.environ["ENDS"])[rank]
time.sleep(seconds)
sys.exit(code)
"""


@pytest.fixture
def launched(tmp_path, monkeypatch, capfd):
    """Run two processes that end after so many seconds with a code each; returns the code and what was said."""
    (tmp_path / "spmconvert").mkdir()
    (tmp_path / "spmconvert" / "__init__.py").touch()
    (tmp_path / "spmconvert" / "__main__.py").write_text(STANDS_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call(*ends):
        monkeypatch.setenv("ENDS", json.dumps(ends))
        code = run_in_processes(["finetune", "a b"], len(ends))
        return code, capfd.readouterr().err.splitlines()

    return call


def test_the_first_process_speaks_for_all(launched):
    assert launched((0, 0), (0, 0), (0.1, 0)) == (0, ["process 0 of 3: finetune a b"])


def test_the_first_that_fails_has_the_last_word_and_the_others_are_stopped(launched):
    began = time.monotonic()
    code, said = launched((60, 0), (1, 7))
    assert code == 7
    assert sorted(said) == ["process 0 of 2: finetune a b", "process 1 of 2: finetune a b"]
    assert launched((0, 5), (60, 0)) == (5, ["process 0 of 2: finetune a b"])
    assert time.monotonic() - began < 50


def test_processes_agree_on_a_place_to_meet(launched, monkeypatch):
    seen = []
    start = subprocess.Popen

    def noted(command, env, stderr):
        seen.append({key: env[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
        assert command[:3] == [sys.executable, "-m", "spmconvert"]
        return start(command, env=env, stderr=stderr)

    monkeypatch.setattr(subprocess, "Popen", noted)
    assert launched((0, 0), (0, 0))[0] == 0
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in seen] == [("0", "0", "2"), ("1", "1", "2")]
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}) == 1
    assert "RANK" not in os.environ
