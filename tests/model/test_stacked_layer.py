"""Stacked layers of experts against one layer an expert in a loop, which is what they were made of."""

import copy

import pytest
import torch
from torch import nn

from spmconvert.errors import UnsupportedLayerError
from spmconvert.model import stacked_layer
from spmconvert.model.grouped import ends_of, grouped_product
from spmconvert.model.stacked_layer import StackedLayer
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear

EXPERTS, IN, OUT = 5, 24, 16
SPM = {"kind": "spm", "stages": 3}
LOW_RANK = {"kind": "lowrank", "rank": 8}
DESIGNS = {
    "lowrank": [LOW_RANK],
    "odd-rank": [{"kind": "lowrank", "rank": 5}],
    "spm": [SPM],
    "rotation": [{**SPM, "variant": "rotation"}],
    "monarch": [{"kind": "monarch", "blocks_in": 4, "blocks_out": 4, "rank": 2}],
    "blockdense": [{"kind": "blockdense", "blocks_out": 4, "rank": 2}],
    "sparse24": [{"kind": "sparse24"}],
    "sparse24-stages": [{"kind": "sparse24", "wrap": True}],
    "spm+lowrank": [SPM, LOW_RANK],
}
FORMS = ["dense", *DESIGNS]
# one expert has no rows, and another one most of them
CHOICE = torch.tensor([0, 0, 1, 3, 3, 3, 3, 3, 3, 4, 4])


def layers_of(form, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    if form == "dense":
        return [nn.Linear(IN, OUT, bias, dtype=dtype) for _ in range(EXPERTS)]
    design = Design.from_options(IN, OUT, DESIGNS[form])
    layers = [SPMLinear(IN, OUT, bias, terms=design.terms, dtype=dtype) for _ in range(EXPERTS)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return layers


def rows_of(dtype=torch.float32):
    return torch.randn(len(CHOICE), IN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def looped(layers, rows, experts=CHOICE):
    return torch.cat([layers[index](row[None]) for index, row in zip(experts.tolist(), rows, strict=True)])


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_a_loop(form, bias, grouped):
    layers = layers_of(form, bias=bias)
    stacked = StackedLayer(layers)
    own, other = (rows_of().requires_grad_() for _ in range(2))
    weights = torch.randn(len(CHOICE), OUT)
    outputs, expected = stacked(own, CHOICE, grouped=grouped), looped(layers, other)
    torch.testing.assert_close(outputs, expected)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own.grad, other.grad)
    parameters = dict(stacked.named_parameters())
    assert parameters.keys() == dict(layers[0].named_parameters()).keys()
    for name, parameter in parameters.items():
        gradients = [layer.get_parameter(name).grad for layer in layers]
        zeros = torch.zeros_like(parameter[0])
        torch.testing.assert_close(parameter.grad, torch.stack([zeros if one is None else one for one in gradients]))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_without_gradients_follows_a_change(form):
    layers = layers_of(form)
    stacked = StackedLayer(layers).eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(stacked(rows_of(), CHOICE), looped(layers, rows_of()))
        for name, parameter in stacked.named_parameters():
            parameter[3].mul_(0.5)
            layers[3].get_parameter(name).mul_(0.5)
        torch.testing.assert_close(stacked(rows_of(), CHOICE), looped(layers, rows_of()))
        stacked.load_state_dict({name: tensor.flip(0) for name, tensor in stacked.state_dict().items()})
        torch.testing.assert_close(stacked(rows_of(), CHOICE), looped(layers[::-1], rows_of()))
        double = stacked.double()
        expected = looped([layer.double() for layer in layers[::-1]], rows_of(torch.float64))
        torch.testing.assert_close(double(rows_of(torch.float64), CHOICE), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["dense", "lowrank", "odd-rank", "spm"])
def test_half_precision_and_autocast(form, dtype):
    layers = layers_of(form, dtype)
    rows = rows_of(dtype)
    torch.testing.assert_close(StackedLayer(layers)(rows, CHOICE), looped(layers, rows), rtol=2e-2, atol=2e-2)
    whole = layers_of(form)
    with torch.autocast("cpu", dtype):
        outputs, expected = StackedLayer(whole)(rows_of(), CHOICE), looped(whole, rows_of())
    assert outputs.dtype == expected.dtype == dtype
    torch.testing.assert_close(outputs, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", ["dense", "spm", "sparse24"])
def test_inference_mode(form):
    with torch.inference_mode():
        layers = layers_of(form)
        stacked = StackedLayer(layers)
        torch.testing.assert_close(stacked(rows_of(), CHOICE, grouped=False), looped(layers, rows_of()))
        for parameter in (*stacked.parameters(), *(one for layer in layers for one in layer.parameters())):
            parameter.mul_(0.5)
        torch.testing.assert_close(stacked(rows_of(), CHOICE, grouped=False), looped(layers, rows_of()))


@pytest.mark.parametrize("form", FORMS)
def test_without_rows(form):
    stacked = StackedLayer(layers_of(form))
    assert stacked(torch.zeros(0, IN), torch.zeros(0, dtype=torch.int64)).shape == (0, OUT)


@pytest.mark.parametrize("form", ["dense", "lowrank", "odd-rank", "spm+lowrank", "sparse24"])
def test_a_compiled_model_has_no_breaks(form):
    layers = layers_of(form)
    stacked = StackedLayer(layers)
    compiled = torch.compile(stacked, backend="eager", fullgraph=True)
    for choice in (CHOICE, CHOICE.flip(0).sub(4).neg()):
        torch.testing.assert_close(compiled(rows_of(), choice), looped(layers, rows_of(), choice))


def test_the_layer_of_one_expert_shares_the_stack_s_memory():
    layers = layers_of("sparse24")
    stacked = StackedLayer(layers)
    one = stacked.layer(3)
    torch.testing.assert_close(one(rows_of()), layers[3](rows_of()), rtol=0, atol=0)
    with torch.no_grad():
        stacked.sparse24.values[3].zero_()
    assert not one.sparse24.values.any()


def test_low_rank_takes_no_loop_of_layers(monkeypatch):
    monkeypatch.setattr(stacked_layer, "functional_call", None)
    monkeypatch.setattr(StackedLayer, "layer", None)
    StackedLayer(layers_of("lowrank"))(rows_of(), CHOICE)
    with torch.no_grad():
        StackedLayer(layers_of("lowrank"))(rows_of(), CHOICE)
    with pytest.raises(TypeError):
        StackedLayer(layers_of("lowrank"))(rows_of(), CHOICE, grouped=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(16, 24), (5, 24), (16, 7), (1, 1)])
def test_grouped_products(dtype, sizes):
    weight = torch.randn(EXPERTS, *sizes, dtype=dtype, requires_grad=True)
    rows = torch.randn(len(CHOICE), sizes[1], dtype=dtype, requires_grad=True)
    ends = ends_of(CHOICE, EXPERTS)
    assert ends.tolist() == [2, 3, 3, 9, 11]
    product = grouped_product(rows, weight, ends)
    expected = torch.einsum("ri,roi->ro", rows, weight[CHOICE])
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(product, expected, **tolerance)
    back = torch.randn_like(product)
    own, other = (torch.autograd.grad(y, (rows, weight), back) for y in (product, expected))
    torch.testing.assert_close(own, other, **tolerance)


def test_a_copy_has_its_own_parameters():
    stacked = StackedLayer(layers_of("lowrank"))
    before, other = stacked(rows_of(), CHOICE), copy.deepcopy(stacked)
    with torch.no_grad():
        other.lowrank.up.weight.zero_()
    torch.testing.assert_close(stacked(rows_of(), CHOICE), before, rtol=0, atol=0)


def test_what_was_put_in_the_place_of_the_parameters_is_refused():
    stacked = StackedLayer(layers_of("lowrank"))

    class Wrapped(nn.Module):
        pass

    wrapped = Wrapped()
    wrapped.base_layer = stacked.lowrank.down
    stacked.lowrank.down = wrapped
    with pytest.raises(UnsupportedLayerError, match=r"a Wrapped is in the place of lowrank\.down\.weight.*adapters"):
        stacked(rows_of(), CHOICE)
