"""A frozen layer computes what the layer did, and makes nothing anew at a call."""

import copy

import pytest
import torch

from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.design import Design
from spmconvert.operator.frozen import FrozenLinear
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.product import DenseProduct
from spmconvert.operator.terms import sparse24, spm

LOW_RANK = {"kind": "lowrank", "rank": 3}
MONARCH = {"kind": "monarch", "blocks_in": 2, "blocks_out": 4, "rank": 3}
SUMS = [
    [{"kind": "spm"}],
    [{"kind": "spm", "variant": "rotation"}, LOW_RANK],
    [{"kind": "spm", "stages": 0}, MONARCH],
    [{"kind": "spm", "block": 2, "stages": 1}, {"kind": "blockdense", "blocks_out": 2, "rank": 3}, LOW_RANK],
    [MONARCH, LOW_RANK],
    [LOW_RANK],
    [{"kind": "sparse24"}, LOW_RANK],
    [{"kind": "sparse24", "wrap": True, "wrap_block": 4, "wrap_stages": 2}],
]
kinds = lambda entries: "+".join(entry["kind"] for entry in entries)  # noqa: E731


def summed(entries, dtype=torch.double):
    torch.manual_seed(0)
    layer = SPMLinear(96, 128, terms=Design.from_options(96, 128, entries).terms, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_computes_what_the_layer_did(entries):
    layer = summed(entries)
    for tokens in (0, 1, CHUNK_TOKENS + 7):
        x = torch.randn(tokens, 96, dtype=torch.double)
        with torch.inference_mode():
            expected = layer(x)
            frozen = FrozenLinear(copy.deepcopy(layer), torch.double)
            torch.testing.assert_close(frozen(x, layer.held_bias), expected)
            torch.testing.assert_close(frozen(x) + layer.held_bias, expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_is_as_exact_in_half_precision_as_the_layer(entries):
    layer = summed(entries, torch.bfloat16)
    x = torch.randn(40, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        own = (layer(x).double() - exact).norm()
        # float32 parameters are rounded once, when they are frozen
        for kept in (layer, copy.deepcopy(layer).float()):
            frozen = FrozenLinear(copy.deepcopy(kept), torch.bfloat16)
            assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
            y = frozen(x, layer.held_bias.bfloat16())
            assert y.dtype == torch.bfloat16
            assert (y.double() - exact).norm() <= 2 * own


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_a_call_makes_nothing_and_a_graph_holds_it_whole(entries, monkeypatch):
    layer = summed(entries)
    frozen = FrozenLinear(copy.deepcopy(layer), torch.double)

    def made(*_, **__):
        raise AssertionError("made anew")

    monkeypatch.setattr(spm, "merge_stages", made)
    monkeypatch.setattr(sparse24.Sparse24Module, "core", made)
    x = torch.randn(5, 96, dtype=torch.double)
    with torch.inference_mode():
        compiled = torch.compile(frozen, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, None), frozen(x))


def test_a_layer_that_runs_dense_is_one_matrix():
    frozen = FrozenLinear(summed(SUMS[-2]), torch.double)
    assert [type(term) for term in frozen.terms] == [DenseProduct]
    assert sum(parameter.numel() for parameter in frozen.parameters()) == 96 * 128
