"""Predicted losses scaled by what the whole model was measured to lose."""

import copy

import pytest
import torch

import spmconvert
from spmconvert.budget.response import Response, divergence
from spmconvert.errors import CalibrationError
from spmconvert.operator.linear import SPMLinear


def test_measured_points_are_met_and_held_outside():
    response = Response.of([(0.5, 4.0), (0.01, 0.02)])
    assert response.loss(0.01) == pytest.approx(0.02)
    assert response.loss(0.5) == pytest.approx(4.0)
    assert response.loss(0.001) == pytest.approx(0.002)
    assert response.loss(1.0) == pytest.approx(8.0)
    # half way on a logarithmic scale the factor is the geometric mean
    assert response.loss((0.5 * 0.01) ** 0.5) == pytest.approx((0.5 * 0.01) ** 0.5 * (8 * 2) ** 0.5)
    assert response.loss(0.0) == 0.0


def test_a_divergence_that_overflows_is_refused(checkpoints):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32).eval()
    layer = replaced(model, "transformer.h.0.mlp.c_fc")
    with torch.no_grad():
        layer.bias.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"c_fc replaced are not finite .* --ignore transformer\.h\.0\.mlp\.c_fc"):
        divergence(model, "transformer.h.0.mlp.c_fc", layer, [ids(model)])


def test_one_point_is_a_factor_and_nothing_measured_is_tiny():
    assert Response.of([(0.1, 0.3)]).loss(0.2) == pytest.approx(0.6)
    assert 0 < Response.of([(0.1, 0.0), (0.2, -1e-9)]).loss(0.15) < 1e-9


def replaced(model, name):
    dense = model.get_submodule(name)
    weight = dense.weight.detach().t() if name.startswith("transformer") else dense.weight.detach()
    layer = SPMLinear(weight.shape[1], weight.shape[0], stages=0, rank=min(weight.shape), bias=dense.bias is not None)
    left, size, right = torch.linalg.svd(weight, full_matrices=False)
    with torch.no_grad():
        layer.scale_out.zero_()
        layer.low_rank_out.copy_(left * size)
        layer.low_rank_in.copy_(right)
        layer.bias.copy_(dense.bias)
    return layer


def ids(model):
    return {"input_ids": torch.randint(0, model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("checkpoint", "name"), [("gpt2", "transformer.h.0.mlp.c_fc"), ("bert", "encoder.layer.0.output.dense")]
)
def test_divergence_of_one_layer(checkpoints, checkpoint, name):
    model = spmconvert.load(checkpoints[checkpoint], dtype=torch.float32).eval()
    batch, layer = ids(model), replaced(model, name)
    before = copy.deepcopy(model.state_dict())
    assert divergence(model, name, layer, [batch]) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        layer.low_rank_out[:, 2:] = 0
    other = copy.deepcopy(model)
    other.set_submodule(name, layer)
    with torch.no_grad():
        target, own = model(**batch)[0], other(**batch)[0]
    if checkpoint == "gpt2":
        expected = torch.nn.functional.kl_div(
            own.log_softmax(-1).flatten(0, 1), target.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
        )
    else:
        unit = [torch.nn.functional.normalize(states.mean(1), dim=-1) for states in (target, own)]
        expected = (unit[0] - unit[1]).square().sum(-1).mean()
    assert expected > 1e-7
    assert divergence(model, name, layer, [batch]) == pytest.approx(expected.item(), rel=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
