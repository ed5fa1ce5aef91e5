"""The Triton kernels on a GPU; without one these are skipped, and nothing here has been run yet."""

import copy
import os

import pytest
import torch

from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.solver import fit_
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.triton import tuning
from tests.operator.accuracy import assert_within_twice

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter stands in for the device"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path / "tiles"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 300, 4096])
@pytest.mark.parametrize("shape", [(96, 96), (130, 70), (768, 3072), (3072, 768), (1024, 1024), (4096, 4096)], ids=str)
def test_within_twice_the_error_of_the_merged_form(shape, tokens, dtype):
    assert_within_twice(Geometry.create(*shape), tokens, dtype, device="cuda")


def layer(*shape):
    torch.manual_seed(0)
    return SPMLinear(*shape, rank=4, backend="triton", device="cuda", dtype=torch.bfloat16).eval().requires_grad_(False)


def test_tiles_are_timed_once_and_kept(cache, monkeypatch):
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    first = layer(1024, 1024)(x)
    assert list(cache.glob("*.json"))
    tuning._chosen.clear()
    monkeypatch.setattr(tuning, "_milliseconds", pytest.fail)
    assert torch.equal(layer(1024, 1024)(x), first)


@pytest.mark.parametrize("tokens", [1, 16])
def test_decoding_is_captured_and_replayed(tokens, monkeypatch):
    mixer = layer(4096, 4096)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        mixer(x)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    # a capture times nothing, known tile or not
    tuning._chosen.clear()
    monkeypatch.setenv("SPMCONVERT_CACHE", os.devnull)
    monkeypatch.setattr(tuning, "_milliseconds", pytest.fail)
    with torch.cuda.graph(graph):
        y = mixer(x)
    x.normal_()
    graph.replay()
    tuning._chosen.clear()
    monkeypatch.undo()
    torch.testing.assert_close(y, mixer(x), rtol=2e-2, atol=2e-2)


def test_a_fit_by_triton_is_the_fit_by_merged():
    torch.manual_seed(0)
    weight = torch.randn(1000, 512, device="cuda") * 512**-0.5
    statistics = ActivationStatistics.of(torch.randn(2000, 512, device="cuda"))
    plain = SPMLinear(512, 1000, backend="merged", device="cuda")
    other = copy.deepcopy(plain)
    other.spm.backend = "triton"
    ends = [fit_(one, weight, None, statistics, iterations=50).end for one in (plain, other)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-2)
