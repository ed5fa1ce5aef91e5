"""The Triton kernels' results, by Triton's interpreter in a process of its own; needs no GPU.

The interpreter has to be chosen before Triton is imported, and a process that interprets cannot compile. So the cases are
in ``interpreted.py`` and ``interpreted_launches.py``, which are not collected by themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spmconvert.errors import BackendError
from spmconvert.operator import dispatch
from spmconvert.operator.dispatch import resolve_backend

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("cases", ["interpreted", "interpreted_launches"])
def test_results_under_the_interpreter(cases):
    file = Path(__file__).with_name(f"{cases}.py")
    # in one process, and without the fixtures of other tests, which build models: starting took longer than running
    command = [sys.executable, "-m", "pytest", str(file), "-n", "0", "--noconftest", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


def test_the_package_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, spmconvert
from spmconvert.operator.linear import SPMLinear
SPMLinear(96, 96)(torch.ones(2, 96))
assert "spmconvert.operator.triton.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_backend_is_resolved(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_backend("triton", "cuda") == "triton"
    with pytest.raises(BackendError, match="runs on cuda, the input is on cpu"):
        resolve_backend("triton", "cpu")
    # never timed, so never chosen
    assert resolve_backend("auto", "cuda") == resolve_backend("auto", "cuda", tokens=1) == "merged"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu") == "triton"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="install triton"):
        resolve_backend("triton", "cuda")
