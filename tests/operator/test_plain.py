"""The plain form of every kind of term has the operator's tensors and computes what it computes."""

import copy
import pickle

import pytest
import torch

from spmconvert.exporting.portable import PLAIN, plain_form
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.plain import MultipliedOut, PlainLayer, PlainWrapped24

# designs, each of 20 inputs and 24 outputs unless it says otherwise
TERMS = {
    "general": [{"kind": "spm", "stages": 5}],
    "rotation": [{"kind": "spm", "stages": 5, "variant": "rotation"}],
    "blocks": [{"kind": "spm", "stages": 2, "block": 4}],
    "diagonal": [{"kind": "spm", "stages": 0}],
    "monarch": [{"kind": "monarch", "blocks_in": 4, "blocks_out": 3, "rank": 2}],
    "blockdense": [{"kind": "blockdense", "blocks_out": 3, "rank": 2}],
    "sparse24": [{"kind": "sparse24"}],
    "wrapped": [{"kind": "sparse24", "wrap": True, "wrap_block": 4}],
    "lowrank": [{"kind": "lowrank", "rank": 3}],
    "several": [
        {"kind": "spm", "stages": 3},
        {"kind": "sparse24"},
        {"kind": "monarch", "blocks_in": 2},
        {"kind": "lowrank"},
    ],
}


def both(entries, bias=True, inputs=22, outputs=24):
    """The operator's layer and the plain one with its tensors."""
    inputs = 20 if any(entry["kind"] == "monarch" for entry in entries) else inputs
    design = Design.from_options(inputs, outputs, entries)
    torch.manual_seed(0)
    layer = SPMLinear(inputs, outputs, bias, terms=design.terms).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    forms = {**{form.__name__: form for form in PLAIN.values()}, PlainWrapped24.__name__: PlainWrapped24}
    terms = {}
    for term in design.terms:
        form, numbers = plain_form(term)
        numbers |= {"bias": bias} if term.kind == "lowrank" else {}
        terms[term.kind] = forms[form](inputs, outputs, **numbers, dtype=None)
    plain = PlainLayer(inputs, outputs, bias, terms, None).eval()
    assert {key: value.shape for key, value in plain.state_dict().items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TERMS)
def test_plain_layers_compute_what_the_operator_does(name, bias):
    layer, plain = both(TERMS[name], bias)
    x = torch.randn(2, 5, layer.in_features)
    exact = torch.nn.functional.linear(x.double(), layer.double().to_dense(), layer.held_bias)
    limit = 2e-6 * exact.abs().max()
    with torch.no_grad():
        for _ in range(2):
            # the second time with what was kept
            assert (plain(x) - exact).abs().max() < limit
    assert (plain(x) - exact).abs().max() < limit, "with gradients"
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters() if parameter.numel())


@pytest.mark.parametrize("name", ["general", "sparse24", "wrapped"])
def test_a_kept_matrix_is_made_again_after_a_change(name):
    _, plain = both(TERMS[name])
    x = torch.randn(3, plain.in_features)
    with torch.no_grad():
        before = plain(x)
        next(next(iter(plain.children())).parameters()).mul_(2)
        changed = plain(x)
    assert (changed - before).abs().max() > 1e-3
    assert torch.allclose(changed, plain(x), atol=1e-5)
    kept = [module for module in plain.modules() if isinstance(module, MultipliedOut) and module._kept is not None]
    assert len(kept) == 1, "the stages inside of a wrapped term keep nothing"
    assert all(module._kept is None for module in copy.deepcopy(plain).modules() if isinstance(module, MultipliedOut))
    assert torch.allclose(pickle.loads(pickle.dumps(plain))(x), changed, atol=1e-5)
    plain.train()
    assert kept[0]._kept is None


def test_plain_layers_follow_autocast_and_the_dtype_of_their_inputs():
    _, plain = both(TERMS["several"])
    x = torch.randn(3, plain.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16
    assert plain(x.bfloat16()).dtype == torch.bfloat16
    assert (plain(x.bfloat16()) - plain(x)).abs().max() < 2e-2 * plain(x).abs().max()
