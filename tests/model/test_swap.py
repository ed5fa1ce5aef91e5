"""Putting layers of a map into a model: names, shapes and modes."""

import pytest
import torch
from torch import nn

from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.errors import CheckpointError
from spmconvert.model.swap import layer_from_spec, swap_layers
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.sparse24 import Sparse24

SPECS = {
    "up": LayerSpec(Design(8, 24, (LowRank(8, 24, 2),)), bias=True),
    "down": LayerSpec(Design(24, 8, (Sparse24(24, 8),)), bias=False),
    "out": LayerSpec(staged_design(8, 8, 2, rank=1), bias=True, dtype="bfloat16"),
}


def dense():
    return nn.ModuleDict(
        {"up": nn.Linear(8, 24), "down": nn.Linear(24, 8), "out": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    )


def test_every_layer_of_the_map_is_replaced_and_no_other():
    model = dense().eval()
    assert swap_layers(model, SPECS) == list(SPECS)
    assert type(model["head"]) is nn.Linear
    for name, spec in SPECS.items():
        layer = model[name]
        assert isinstance(layer, SPMLinear)
        assert layer.design == spec.design
        assert (layer.held_bias is not None) == spec.bias
        assert not any(module.training for module in layer.modules())
    assert {p.dtype for p in model["out"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model["up"].parameters()} == {torch.float32}


def test_layers_are_built_where_the_dense_ones_are():
    with torch.device("meta"):
        model = dense()
    swap_layers(model, SPECS)
    assert all(tensor.is_meta for name in SPECS for tensor in model[name].state_dict().values())


def test_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"layer up is \(24, 8\) in the model and \(8, 8\) in the layer map"):
        swap_layers(dense(), {"up": SPECS["out"]})


def test_a_fresh_layer_keeps_the_size_of_its_inputs():
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    for term in (LowRank(64, 64, 32), Sparse24(64, 64)):
        y = layer_from_spec(LayerSpec(Design(64, 64, (term,)), bias=True))(x)
        assert 0.5 < y.square().mean().item() < 2
