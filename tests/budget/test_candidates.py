"""Candidates on a layer whose best answers a decomposition gives."""

import pytest
import torch

from spmconvert.budget import curves
from spmconvert.budget.cache import CacheIdentity
from spmconvert.budget.candidates import candidate_geometries, measure_curve, predicted_loss
from spmconvert.budget.curves import measure_curves
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import load_rows
from spmconvert.fit.error import measure_error
from spmconvert.model.loading import load_dense_model
from spmconvert.operator.factors import covariance_root, truncated_svd
from spmconvert.operator.geometry import Geometry


def drawn(rows, out_features=24, in_features=16):
    """A dense layer, its inputs with a mean, and a metric to which few directions matter."""
    torch.manual_seed(0)
    spread = torch.randn(in_features, in_features) * torch.linspace(0.1, 2.0, in_features)[:, None]
    inputs = torch.randn(rows, in_features) @ spread + torch.randn(in_features)
    directions = torch.randn(out_features, 3)
    metric = OutputMetric.of(directions @ directions.t() + 0.1 * torch.eye(out_features))
    return (torch.randn(out_features, in_features), torch.randn(out_features)), inputs, metric


def test_predicted_loss_is_the_mean_cost_of_the_rows_errors():
    dense, inputs, metric = drawn(500)
    other = (dense[0] + 0.1 * torch.randn_like(dense[0]), dense[1] + 0.1 * torch.randn_like(dense[1]))
    missed = inputs @ (dense[0] - other[0]).t() + dense[1] - other[1]
    curvature = (metric.vectors * (metric.values - metric.level)) @ metric.vectors.t() + metric.level * torch.eye(24)
    expected = torch.einsum("ri,ij,rj->", missed, curvature, missed).item() / len(inputs)
    assert predicted_loss(metric, dense, other, ActivationStatistics.of(inputs)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("structure", ["lowrank", "companion"])
def test_weighted_candidates_cost_the_model_less_and_plain_ones_miss_less(structure):
    dense, inputs, metric = drawn(800)
    statistics = ActivationStatistics.of(inputs)
    geometries = candidate_geometries(16, 24, structure)
    weighted, plain = (
        measure_curve(geometries, dense, statistics, statistics, metric, 30, weighted=weighted)
        for weighted in (True, False)
    )
    assert len(weighted) == len(plain) == len(geometries) > 0
    for own, other in zip(weighted, plain, strict=True):
        assert own.loss < 0.95 * other.loss
        assert own.error > other.error
    unweighted = measure_curve(geometries, dense, statistics, statistics, None, 30, weighted=True)
    assert [one.error for one in unweighted] == [one.error for one in plain]
    assert all(one.loss == one.error for one in unweighted)


def test_low_rank_candidates_are_the_best_of_their_rank_in_the_metric():
    dense, inputs, metric = drawn(800)
    statistics = ActivationStatistics.of(inputs)
    geometries = [Geometry.create(16, 24, 0, "general", 1, rank) for rank in (2, 5)]
    for candidate in measure_curve(geometries, dense, statistics, statistics, metric, 1, weighted=True):
        left, right = truncated_svd(dense[0], covariance_root(statistics.covariance), candidate.rank, metric)
        best = (left @ right, statistics.corrected_bias(dense[0], left @ right, dense[1]))
        assert candidate.loss == pytest.approx(predicted_loss(metric, dense, best, statistics), rel=1e-4)
        assert candidate.geometry(16, 24) == geometries[candidate.rank == 5]


def test_candidates_are_fitted_on_some_rows_and_measured_on_others():
    dense, inputs, metric = drawn(100)
    fitted, held_out = ActivationStatistics.of(inputs[:30]), ActivationStatistics.of(inputs[30:])
    (found,) = measure_curve(
        [Geometry.create(16, 24, 0, "general", 1, 4)], dense, fitted, held_out, metric, 1, weighted=False
    )
    left, right = truncated_svd(dense[0], covariance_root(fitted.covariance), 4)
    bias = fitted.corrected_bias(dense[0], left @ right, dense[1])
    outputs, replaced = inputs[30:] @ dense[0].t() + dense[1], inputs[30:] @ (left @ right).t() + bias
    expected = ((outputs - replaced).square().sum() / outputs.square().sum()).item()
    assert found.error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("weighted", [True, False])
def test_curves_and_responses_are_fitted_as_the_recipe_says(checkpoints, text, cache, monkeypatch, weighted):
    name = "transformer.h.0.mlp.c_fc"
    changes = {"calibration.rows": 16, "structures": "lowrank", "targets": name, "output_weighting": weighted}
    recipe = resolve_recipe(None, {"keep": 0.5, "calib": text, **changes})
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    rows = load_rows(source.directory, config, recipe.calibration, recipe.seed, choosing=True)
    model = load_dense_model(source.directory, config, "cpu")
    tried = []
    monkeypatch.setattr(curves, "divergence", lambda _, __, layer, ___: tried.append(layer) or 1.0)
    identity = CacheIdentity.of_checkpoint(source, "cpu")
    found = measure_curves(source, plan, recipe, identity, rows, lambda: model, lambda *_: None, lambda *_: None)
    moments = gather_moments(model, plan.layers, rows, lambda *_: None, choosing=True, weighted=True, seed=recipe.seed)[
        name
    ]
    dense, root = model.get_submodule(name), covariance_root(moments.fitted.covariance)
    weight, bias = dense.weight.detach().t(), dense.bias.detach()
    metric = moments.metric if weighted else None
    for candidate in found.candidates[0]:
        left, right = truncated_svd(weight, root, candidate.rank, metric)
        best = (left @ right, moments.fitted.corrected_bias(weight, left @ right, bias))
        error = measure_error((weight, bias), best, moments.measured).relative
        assert candidate.error == pytest.approx(error, rel=1e-2)
    assert len(tried) > 1
    for layer in tried:
        left, right = truncated_svd(weight, root, layer.geometry.rank, metric)
        missed = [root @ (weight - matrix).t() for matrix in (layer.to_dense().detach(), left @ right)]
        energies = [(rows.square().sum() if metric is None else metric.energy(rows)).item() for rows in missed]
        # the diagonals of an SPM layer are worth less than half a percent of it
        assert 0.995 * energies[1] <= energies[0] <= 1.001 * energies[1]
