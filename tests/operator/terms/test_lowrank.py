"""Low rank: alone in a layer exactly two nn.Linear, beside other terms added to them, and the best of its rank."""

import pytest
import torch
from torch import nn

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.design import Design
from spmconvert.operator.factors import covariance_root, truncated_svd
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.module import LeastSquares


def alone(bias=True, dtype=torch.float32):
    """A layer of low rank alone and the two layers that it is."""
    torch.manual_seed(0)
    layer = SPMLinear(96, 130, bias, stages=0, rank=5, dtype=dtype)
    two = nn.Sequential(nn.Linear(96, 5, bias=False, dtype=dtype), nn.Linear(5, 130, bias=bias, dtype=dtype))
    with torch.no_grad():
        if bias:
            layer.held_bias.normal_()
        two[0].weight.copy_(layer.lowrank.down.weight)
        two[1].load_state_dict(layer.lowrank.up.state_dict())
    return layer, two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (2, 3, 96), (2 * CHUNK_TOKENS + 7, 96)], ids=str)
def test_alone_it_is_two_linear_layers_bit_for_bit(shape, bias, dtype):
    layer, two = alone(bias, dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    assert torch.equal(layer(x), two(x))
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(two(x).square().sum(), [x, *two.parameters()])
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(layer(x), two(x))
    with torch.inference_mode():
        assert torch.equal(layer(x), two(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), two(x))


@pytest.mark.parametrize("bias", [True, False])
def test_alone_it_has_the_parameters_of_two_linear_layers_and_no_others(bias):
    layer, two = alone(bias)
    assert [type(module) for module in layer.modules()][2:] == [nn.Linear, nn.Linear]
    assert [tuple(p.shape) for p in layer.parameters()] == [tuple(p.shape) for p in two.parameters()]
    names = ["lowrank.down.weight", "lowrank.up.weight", *(["lowrank.up.bias"] if bias else [])]
    assert [name for name, _ in layer.named_parameters()] == names
    assert [name for name, _ in layer.named_buffers()] == ["weight"]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [3, CHUNK_TOKENS + 1])
def test_parameters_may_be_wider_than_the_inputs(tokens, grad):
    layer, two = alone()
    x = torch.randn(tokens, 96)
    with torch.set_grad_enabled(grad):
        for dtype, allowed in ((torch.bfloat16, 0.02), (torch.float16, 2e-3)):
            y = layer(x.to(dtype))
            assert y.dtype == dtype
            assert (y.float() - two(x)).norm() / two(x).norm() < allowed
        y = layer(x.double())
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, two.double()(x.double()))


def test_autocast_takes_its_dtype_and_trains_in_that_of_the_parameters():
    layer, _ = alone()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 96))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


class Adapted(nn.Module):
    """A layer with another beside it, as adapters wrap one."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.beside = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.beside(x)


TERMS = {
    "alone": [{"kind": "lowrank", "rank": 5}],
    "stages": [{"kind": "spm"}, {"kind": "lowrank", "rank": 5}],
    "sparse": [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 5}],
}


def summed(terms):
    """A layer of several terms in which low rank does something."""
    torch.manual_seed(0)
    layer = SPMLinear(96, 130, terms=Design.from_options(96, 130, TERMS[terms]).terms).eval()
    with torch.no_grad():
        layer.lowrank.up.weight.normal_()
        layer.lowrank.up.bias.normal_()
    return layer


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [3, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("child", ["down", "up"])
@pytest.mark.parametrize("terms", TERMS)
def test_children_that_were_replaced_are_asked(terms, child, tokens, grad):
    layer = summed(terms)
    x = torch.randn(tokens, 96)
    low_rank = layer.lowrank
    with torch.set_grad_enabled(grad):
        # what is kept from before must not be taken
        expected = layer(x) - low_rank(x)
        setattr(low_rank, child, Adapted(getattr(low_rank, child)))
        torch.testing.assert_close(layer(x), expected + low_rank(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [3, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("child", ["down", "up"])
@pytest.mark.parametrize("terms", TERMS)
def test_hooks_on_children_are_called_and_heard(terms, child, tokens, grad):
    layer = summed(terms)
    x = torch.randn(tokens, 96)
    calls = []

    def doubled(_, inputs, output):
        calls.append(1)
        return 2 * output

    with torch.set_grad_enabled(grad):
        others = layer(x) - layer.lowrank(x)
        product = layer.lowrank.biased(x, None)
        handle = getattr(layer.lowrank, child).register_forward_hook(doubled)
        bias = layer.held_bias * (1 if child == "down" else 2)
        torch.testing.assert_close(layer(x), others + 2 * product + bias, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1
        handle.remove()
        torch.testing.assert_close(layer(x), others + product + layer.held_bias, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1


@pytest.mark.parametrize("tokens", [3, CHUNK_TOKENS + 1])
def test_a_forward_that_was_put_over_a_child_is_called(tokens):
    layer = summed("stages")
    x = torch.randn(tokens, 96)
    with torch.no_grad():
        expected = layer(x) + layer.lowrank.biased(x, None)
        own = layer.lowrank.down.forward
        layer.lowrank.down.forward = lambda rows: 2 * own(rows)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_steps_of_a_trained_adapter_reach_it():
    layer = summed("stages").requires_grad_(False)
    layer.lowrank.down = Adapted(layer.lowrank.down)
    layer(torch.randn(3, 96)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["lowrank.down.beside.weight"]


@pytest.mark.parametrize("weighted", [False, True])
def test_solved_is_the_truncated_svd_with_factors_of_one_norm(weighted):
    torch.manual_seed(0)
    rows = torch.randn(200, 24) @ torch.randn(24, 24)
    root, weight = covariance_root(torch.cov(rows.t())), torch.randn(40, 24)
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -4, 40))) if weighted else None
    module = LowRank(24, 40, 6).build()
    module.solve_(LeastSquares(weight, root, metric))
    left, right = truncated_svd(weight, root, 6, metric)
    torch.testing.assert_close(module.matrix(), left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.up.weight.norm(dim=0), module.down.weight.norm(dim=1))


def test_factors_of_directions_without_energy_are_finite():
    module = LowRank(24, 40, 3).build()
    left, right = torch.randn(40, 3), torch.randn(3, 24)
    left[:, 1], right[2] = 0, 0
    module.set_factors_(left, right)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    torch.testing.assert_close(module.matrix(), left @ right)


def test_designs_are_the_largest_aligned_rank():
    def ranks(parameters):
        return [term.rank for term in LowRank.designs(64, 48, parameters)]

    assert ranks(111) == []
    assert ranks(112) == [1]
    assert ranks(8 * 112) == [8]
    assert ranks(15 * 112) == [8]
    assert ranks(17 * 112) == [16]
    assert ranks(10**9) == [48]
