"""Predicted losses scaled by what the whole model was measured to lose."""

import copy
import itertools

import pytest
import torch

import spmconvert
from spmconvert.budget.response import (
    MOST_MEASURED,
    Divergences,
    Response,
    between,
    divergences_by_block,
    measured_sample,
    role_of,
)
from spmconvert.errors import CalibrationError
from spmconvert.model.chain import chain_through
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
        layer.held_bias.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"c_fc replaced are not finite .* --ignore transformer\.h\.0\.mlp\.c_fc"):
        Divergences(model, [ids(model)]).of("transformer.h.0.mlp.c_fc", layer)


def test_one_point_is_a_factor_and_nothing_measured_is_tiny():
    assert Response.of([(0.1, 0.3)]).loss(0.2) == pytest.approx(0.6)
    assert 0 < Response.of([(0.1, 0.0), (0.2, -1e-9)]).loss(0.15) < 1e-9


def replaced(model, name):
    dense = model.get_submodule(name)
    weight = dense.weight.detach().t() if name.startswith("transformer") else dense.weight.detach()
    layer = SPMLinear(weight.shape[1], weight.shape[0], stages=0, rank=min(weight.shape), bias=dense.bias is not None)
    left, size, right = torch.linalg.svd(weight, full_matrices=False)
    with torch.no_grad():
        layer.lowrank.set_factors_(left * size, right)
        layer.held_bias.copy_(dense.bias)
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
    divergences = Divergences(model, [batch])
    assert divergences.of(name, layer) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        layer.lowrank.up.weight[:, 2:] = 0
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
    assert divergences.of(name, layer) == pytest.approx(expected.item(), rel=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("checkpoint", "container", "names"),
    [
        ("gpt2", "transformer.h", ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
        ("bert", "encoder.layer", ["encoder.layer.1.output.dense"]),
    ],
)
def test_one_walk_finds_what_whole_models_do(checkpoints, checkpoint, container, names):
    model = spmconvert.load(checkpoints[checkpoint], dtype=torch.float32).eval()
    batches = [ids(model), {"input_ids": ids(model)["input_ids"].flip(0)}]

    def replacements(name):
        for rank in (2, 5):
            layer = replaced(model, name)
            with torch.no_grad():
                layer.lowrank.up.weight[:, rank:] = 0
            yield layer

    before = copy.deepcopy(model.state_dict())
    found = divergences_by_block(chain_through(model, container, batches[0]), batches, names, replacements)
    divergences = Divergences(model, batches)
    for name in names:
        assert found[name] == pytest.approx([divergences.of(name, layer) for layer in replacements(name)], rel=1e-3)
        assert found[name][0] > found[name][1] > 1e-7
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_the_dense_model_puts_out_is_computed_once(checkpoints):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32).eval()
    calls = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    divergences = Divergences(model, [ids(model), ids(model)])
    seen = len(calls)
    layer = replaced(model, "transformer.h.1.mlp.c_fc")
    with torch.no_grad():
        layer.lowrank.up.weight[:, 2:] = 0
    once = divergences.of("transformer.h.1.mlp.c_fc", layer)
    assert len(calls) == seen + 2, "by the student alone"
    # a mean over positions: the same batch twice is the same
    assert once == pytest.approx(Divergences(model, [ids(model)]).of("transformer.h.1.mlp.c_fc", layer), rel=1e-5)


def test_a_mixture_lies_between_by_factors():
    low, high = Response.of([(0.01, 0.02), (0.5, 4.0)]), Response.of([(0.04, 0.04 * 8), (0.5, 0.5 * 2)])
    for share in (0.0, 0.25, 0.5, 1.0):
        mixed = low.mixed(high, share)
        for (a, b), (c, d), (predicted, measured) in zip(low.points, high.points, mixed.points, strict=True):
            assert predicted == pytest.approx(a ** (1 - share) * c**share)
            assert measured / predicted == pytest.approx((b / a) ** (1 - share) * (d / c) ** share)


def test_roles_are_names_without_numbers():
    assert role_of("model.layers.11.mlp.up_proj") == role_of("model.layers.0.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert role_of("h.0.c2.w1") == "h.*.c2.w1"


@pytest.mark.parametrize(("blocks", "roles"), [(3, 2), (12, 2), (13, 2), (40, 2), (80, 7), (5, 40)])
def test_a_few_layers_of_every_role_are_measured_and_the_ends_are_among_them(blocks, roles):
    names = [f"h.{block}.part_{role}" for block in range(blocks) for role in range(roles)]
    sample = measured_sample(names)
    assert sample == [name for name in names if name in set(sample)], "in the order of the model"
    assert len(sample) <= max(MOST_MEASURED, 2 * roles)
    if blocks * roles <= MOST_MEASURED:
        assert sample == names
    for role in range(roles):
        measured = [block for block in range(blocks) if f"h.{block}.part_{role}" in sample]
        assert measured[0] == 0
        assert measured[-1] == blocks - 1
        steps = [after - before for before, after in itertools.pairwise(measured)]
        assert max(steps) - min(steps) <= 1


def test_layers_that_were_not_measured_lie_between_their_neighbours():
    names = [f"h.{block}.{role}" for block in range(5) for role in ("a", "b")]
    points = {name: [(0.1, 0.1 * factor), (1.0, factor)] for name, factor in (("h.0.a", 2), ("h.4.a", 32), ("h.2.b", 5))}
    points |= {name: [(0.1, 0.3), (1.0, 3.0)] for name in ("h.0.b", "h.4.b")}
    measured = {name: Response.of(own) for name, own in points.items()}
    found = between(names, measured)
    assert set(found) == set(names)
    assert {name: found[name] for name in measured} == measured
    assert [found[f"h.{block}.a"].loss(0.5) for block in range(5)] == pytest.approx([1, 2, 4, 8, 16])
    assert [found[f"h.{block}.b"].loss(0.5) for block in range(5)] == pytest.approx(
        [1.5, 0.5 * 15**0.5, 2.5, 0.5 * 15**0.5, 1.5]
    )
    assert list(found) == names, "in the order of the model, whatever was measured"
