"""A product of two factors in the low-rank term of a layer, against the sum of both; and out again, to the same bits."""

import pytest
import torch

from spmconvert.errors import UnsupportedLayerError
from spmconvert.operator.folding import folded, rank_of, unfolded
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.registry import term_from_options

IN, OUT = 32, 48
LAYERS = {
    "stages": [{"kind": "spm", "stages": 4}],
    "low rank": [{"kind": "lowrank", "rank": 5}],
    "stages and low rank": [{"kind": "spm", "stages": 4}, {"kind": "lowrank", "rank": 5}],
    "2:4": [{"kind": "sparse24"}],
    "monarch": [{"kind": "monarch"}],
}


def layer_of(terms, *, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = SPMLinear(IN, OUT, bias, terms=[term_from_options(IN, OUT, term) for term in terms], dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def factors(rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(OUT, rank, generator=generator), torch.randn(rank, IN, generator=generator)
    return left.to(dtype), right.to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_sum_and_comes_out_again(name, bias):
    layer, (left, right) = layer_of(LAYERS[name], bias=bias), factors(3)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(7, IN, dtype=torch.float64)
    grown = folded(layer, left, right)
    assert grown.design.term("lowrank").rank == rank_of(layer) + 3
    assert [term.kind for term in grown.design.terms if term.kind != "lowrank"] == [
        term["kind"] for term in LAYERS[name] if term["kind"] != "lowrank"
    ]
    expected = layer(x) + x @ right.t() @ left.t()
    torch.testing.assert_close(grown(x), expected, rtol=1e-12, atol=1e-12)
    assert (grown.held_bias is not None) is bias
    again = unfolded(grown, rank_of(layer))
    assert again.design == layer.design
    state = again.state_dict()
    assert list(state) == list(before)
    assert all(state[key].equal(before[key]) for key in before)


def test_factors_of_any_scale_stay_within_half_precision():
    layer = layer_of(LAYERS["low rank"], dtype=torch.float16)
    left, right = factors(2, torch.float32)
    low = folded(layer, left * 1e6, right * 1e-6).low_rank
    assert low.up.weight.dtype == torch.float16
    added = low.up.weight[:, 5:].float() @ low.down.weight[5:].float()
    torch.testing.assert_close(added, left @ right, rtol=0, atol=4 * 2**-11 * float((left @ right).abs().max()))


def test_the_new_factors_are_trained_where_the_layer_is():
    layer = layer_of(LAYERS["stages"]).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in folded(layer, *factors(2)).parameters())
    layer.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in folded(layer, *factors(2)).parameters())


def test_what_cannot_take_it_is_refused():
    with pytest.raises(UnsupportedLayerError, match="rank 28 beside low rank 5 is rank 33; a matrix of 32 x 48 has 32"):
        folded(layer_of(LAYERS["low rank"]), *factors(28))
    assert rank_of(folded(layer_of(LAYERS["low rank"]), *factors(27))) == 32
    with pytest.raises(UnsupportedLayerError, match="without offloading"):
        folded(layer_of(LAYERS["low rank"]).to("meta"), *factors(2))
    wrapped = layer_of(LAYERS["low rank"])
    wrapped.low_rank.up.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UnsupportedLayerError, match="no longer two plain"):
        folded(wrapped, *factors(2))
