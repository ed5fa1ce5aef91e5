"""Cases of ``test_kernels.py`` about launches, with TRITON_INTERPRET=1: all candidates, tuning, far rows, decoding."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import merge_plan, merge_stages
from spmconvert.operator.triton import launches, tiles, tuning
from spmconvert.operator.triton.mix import _passes, mix
from spmconvert.operator.triton.tiles import Pass
from tests.operator.accuracy import assert_within_twice
from tests.operator.test_merged import tensors
from tests.operator.triton.interpreted import fuses, layers, merge_by_pytorch, poison, small_groups  # noqa: F401

assert interprets_triton()

# shape, tokens, dtype, whether two passes are fused, most candidates after the first
CASES = [
    ((12, 10), 18, torch.float16, False, 3),
    ((12, 12), 18, torch.float16, True, 2),
    ((10, 11), 18, torch.float32, False, 2),
    ((8, 32), 2, torch.float16, False, 2),
]
OTHERS = [(*case[:-1], place + 1) for case in CASES for place in range(case[-1])]


@pytest.mark.parametrize(("shape", "tokens", "dtype", "fused", "place"), OTHERS, ids=str)
def test_every_candidate_is_within_twice_the_error(shape, tokens, dtype, fused, place, monkeypatch, request):
    if fused:
        request.getfixturevalue("fuses")
    # small passes cut most candidates to the same tile; uncut ones are only masked more
    monkeypatch.setattr(tiles, "_side", lambda size, largest: largest)

    def choose(kernel, passes, x, constants, run):
        options = tiles.candidates(kernel, passes, x.element_size())
        return options[min(place, len(options) - 1)]

    monkeypatch.setattr(launches, "choose", choose)
    assert_within_twice(Geometry.create(*shape), tokens, dtype)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Kernels that were timed, by a clock that runs a candidate and finds the last one the fastest."""
    found = []

    def milliseconds(device, run):
        found.append(run.func.__qualname__.split(".")[0])
        run()
        return -len(found)

    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_can_time", lambda x: True)
    monkeypatch.setattr(tuning, "_describe", lambda device: tuning.Device("a GPU", 132, 227 * 1024))
    monkeypatch.setattr(tuning, "_captures", lambda device: False)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return found


def test_a_layer_is_tuned_at_first_use(timed):
    plain, triton = layers(10, 14)
    assert not timed
    x = torch.randn(18, 10, requires_grad=True)
    found = []
    for layer in (plain, triton):
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert set(timed) == {"_launch_mix", "block_gradient"}
    timed.clear()
    again = triton(x)
    assert torch.equal(again, found[1][0])
    assert not timed
    with torch.no_grad():
        triton(x[:2])
    assert set(timed) == {"_launch_few"}


def test_a_compiled_layer_is_tuned_when_it_runs(timed):
    plain, layer = layers(10, 11)
    x = torch.randn(18, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))
        assert timed
        timed.clear()
        compiled(x)
    assert not timed


@pytest.fixture
def far(tmp_path):
    """Makes rows so far apart that 32 bits do not count to the last one; the file behind them is nearly all hole."""

    def make(name, tokens, features):
        stride = launches.LARGEST_ROW_STRIDE
        assert stride * (tokens - 1) >= 2**31
        numbers = torch.from_file(str(tmp_path / name), shared=True, size=stride * tokens, dtype=torch.float16)
        return numbers.as_strided((tokens, features), (stride, 1))

    return make


@pytest.mark.parametrize("kernel", ["mix", "few_tokens", "fused"])
def test_offsets_that_need_64_bits(kernel, far, monkeypatch):
    tokens, geometry = 130, Geometry.create(10, 12)
    if kernel == "few_tokens":
        # a program for each token takes long to interpret; nothing but the stride of a tile's rows has to be small
        tokens = 5
        monkeypatch.setattr(launches, "LARGEST_ROW_STRIDE", 1 << 29)
        monkeypatch.setattr(tiles, "FEW_TOKENS", tokens)
    monkeypatch.setattr(tiles, "FUSED_TOKENS", tokens if kernel == "fused" else tokens + 1)
    x, *parameters, bias = (p.detach().half() for p in tensors(geometry, tokens))
    plan = merge_plan(geometry)
    blocks = [block.half() for block in merge_stages(*parameters, plan)]
    shape = [10, 12, 1, *(group.inner for group in plan.groups)]
    (expected,) = mix(x, blocks, bias, shape, False)
    far_x, far_y = far("x", *x.shape), far("y", tokens, 12)
    far_x.copy_(x)
    allocate = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda own, *size, **o: far_y if size == (tokens, 12) else allocate(own, *size, **o)
    )
    launched, launch = [], launches.launch
    monkeypatch.setattr(launches, "launch", lambda name, *rest: (launched.append(name), launch(name, *rest)))
    passes = _passes(blocks, shape)
    y, _ = launches.run_passes(far_x, blocks, bias, passes, 12, keep=False, transposed=False)
    assert set(launched) == {f"{kernel}_kernel"}
    assert y.data_ptr() == far_y.data_ptr()
    assert torch.equal(y, expected)


def test_offsets_of_the_gradient_that_need_64_bits(far):
    tokens, p = 130, Pass(3, 4, 4, 1, 1)
    grad, x = torch.randn(tokens, 12).half(), torch.randn(tokens, 10).half()
    far_grad, far_x = far("grad", *grad.shape).copy_(grad), far("x", *x.shape).copy_(x)
    found = launches.block_gradient(far_grad, far_x, p, torch.float32)
    assert torch.equal(found, launches.block_gradient(grad, x, p, torch.float32))


class Operations(TorchDispatchMode):
    """Names of the tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("tokens", [1, 2])
def test_decoding_is_launches_and_allocations(tokens, monkeypatch):
    # what a graph can capture: nothing waits for the device, and nothing is merged again
    layer = SPMLinear(12, 12, backend="triton").requires_grad_(False).eval()
    x = torch.randn(tokens, 12)
    layer(x)
    launched = []
    monkeypatch.setattr(launches, "launch", lambda kernel, *_: launched.append(kernel))
    with Operations() as operations:
        layer(x)
    assert operations.names <= {"view", "mix"}
    blocks = layer.spm._cache.blocks
    shape = [12, 12, 1, *(group.inner for group in layer.spm.plan.groups)]
    with Operations() as operations:
        launches.run_passes(x, blocks, layer.bias, _passes(blocks, shape), 12, keep=False, transposed=False)
    assert operations.names <= {"new_empty", "fill_"}  # filled by the fixture
    assert launched == ["few_tokens_kernel"] * 4
