"""Candidates on a layer whose best answers a decomposition gives, and low rank at every rank from one of them."""

import pytest
import torch

from spmconvert.budget.candidates import (
    Candidate,
    Subject,
    designs_of,
    predicted_loss,
    standing_designs_of,
)
from spmconvert.budget.lowrank import DENSELY, candidate_ranks, low_rank_curve
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.calibrate.store import Moments
from spmconvert.fit.error import measure_error
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.factors import covariance_root, truncated_svd
from spmconvert.recipe.loading import recipe_from_keywords


def drawn(rows, out_features=24, in_features=16):
    """A dense layer, its inputs with a mean, and a metric to which few directions matter."""
    torch.manual_seed(0)
    spread = torch.randn(in_features, in_features) * torch.linspace(0.1, 2.0, in_features)[:, None]
    inputs = torch.randn(rows, in_features) @ spread + torch.randn(in_features)
    directions = torch.randn(out_features, 3)
    metric = OutputMetric.of(directions @ directions.t() + 0.1 * torch.eye(out_features))
    return (torch.randn(out_features, in_features), torch.randn(out_features)), inputs, metric


def subject(dense, fitted, choosing, metric=None, iterations=30, **changes):
    recipe = recipe_from_keywords({"keep": 0.5, "calib": "text.txt", "budget.iterations": iterations, **changes})
    return Subject(*dense, Moments(fitted, choosing, choosing, metric), recipe)


def best_of_rank(dense, rank, fitted, metric):
    """Weight and bias of the explicit truncated SVD."""
    left, right = truncated_svd(dense[0], covariance_root(fitted.covariance), rank, metric)
    return left @ right, fitted.corrected_bias(dense[0], left @ right, dense[1])


def test_predicted_loss_is_the_mean_cost_of_the_rows_errors():
    dense, inputs, metric = drawn(500)
    other = (dense[0] + 0.1 * torch.randn_like(dense[0]), dense[1] + 0.1 * torch.randn_like(dense[1]))
    missed = inputs @ (dense[0] - other[0]).t() + dense[1] - other[1]
    curvature = (metric.vectors * (metric.values - metric.level)) @ metric.vectors.t() + metric.level * torch.eye(24)
    expected = torch.einsum("ri,ij,rj->", missed, curvature, missed).item() / len(inputs)
    assert predicted_loss(metric, dense, other, ActivationStatistics.of(inputs)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kinds", ["lowrank", "spm+lowrank", "sparse24+lowrank"])
def test_weighted_candidates_cost_the_model_less_and_plain_ones_miss_less(kinds):
    dense, inputs, metric = drawn(800)
    statistics = ActivationStatistics.of(inputs)
    sums = {
        "lowrank": [[{"kind": "lowrank", "rank": rank}] for rank in (1, 2, 5, 8)],
        "spm+lowrank": [[{"kind": "spm", "stages": 2}, {"kind": "lowrank", "rank": rank}] for rank in (1, 4)],
        "sparse24+lowrank": [[{"kind": "sparse24"}, {"kind": "lowrank", "rank": rank}] for rank in (1, 2)],
    }
    designs = [Design.from_options(16, 24, entries) for entries in sums[kinds]]
    weighted, plain = (
        subject(dense, statistics, statistics, metric, output_weighting=weighted).measure(designs)
        for weighted in (True, False)
    )
    assert len(weighted) == len(plain) == len(designs) > 0
    for own, other in zip(weighted, plain, strict=True):
        assert own.loss < 0.95 * other.loss
        assert own.error > other.error
    unweighted = subject(dense, statistics, statistics, None, output_weighting=True).measure(designs)
    assert [one.error for one in unweighted] == [one.error for one in plain]
    assert all(one.loss == one.error for one in unweighted)


def test_low_rank_candidates_are_the_best_of_their_rank_in_the_metric():
    dense, inputs, metric = drawn(800)
    statistics = ActivationStatistics.of(inputs)
    designs = [staged_design(16, 24, 0, rank=rank) for rank in (2, 5)]
    found = subject(dense, statistics, statistics, metric, iterations=1).measure(designs)
    for candidate, design in zip(found, designs, strict=True):
        best = best_of_rank(dense, candidate.terms[0]["rank"], statistics, metric)
        assert candidate.loss == pytest.approx(predicted_loss(metric, dense, best, statistics), rel=1e-4)
        assert candidate.design(16, 24) == design
        assert candidate.kinds == ("lowrank",)


def test_candidates_are_fitted_on_some_rows_and_measured_on_others():
    dense, inputs, metric = drawn(100)
    fitted, held_out = ActivationStatistics.of(inputs[:30]), ActivationStatistics.of(inputs[30:])
    work = subject(dense, fitted, held_out, metric, iterations=1, output_weighting=False)
    (found,) = work.measure([staged_design(16, 24, 0, rank=4)])
    matrix, bias = best_of_rank(dense, 4, fitted, None)
    outputs, replaced = inputs[30:] @ dense[0].t() + dense[1], inputs[30:] @ matrix.t() + bias
    expected = ((outputs - replaced).square().sum() / outputs.square().sum()).item()
    assert found.error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same_rows", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_low_rank_at_every_rank_is_the_explicit_one(weighted, same_rows, bias, shape):
    dense, inputs, metric = drawn(500, shape[1], shape[0])
    dense = dense if bias else (dense[0], None)
    fitted = ActivationStatistics.of(inputs)
    # other rows have another mean and other directions
    choosing = fitted if same_rows else ActivationStatistics.of(1.3 * inputs[:100].flip(1) + torch.randn(shape[0]))
    moments = Moments(fitted, choosing, choosing, metric)
    found = low_rank_curve(*dense, moments, weighted=weighted, predicts=True)
    plain = low_rank_curve(*dense, moments, weighted=weighted, predicts=False)
    assert found.ranks == plain.ranks == tuple(candidate_ranks(*shape))
    assert found.errors == plain.errors == plain.losses
    for rank, error, loss in zip(found.ranks, found.errors, found.losses, strict=True):
        best = best_of_rank(dense, rank, fitted, metric if weighted else None)
        assert error == pytest.approx(measure_error(dense, best, choosing).relative, rel=1e-3)
        assert loss == pytest.approx(predicted_loss(metric, dense, best, choosing), rel=1e-3)


def test_low_rank_at_every_rank_is_what_the_fit_gives():
    dense, inputs, metric = drawn(500)
    fitted, choosing = ActivationStatistics.of(inputs[:300]), ActivationStatistics.of(inputs[300:])
    work = subject(dense, fitted, choosing, metric)
    curve = low_rank_curve(*dense, work.moments, weighted=True, predicts=True)
    measured = work.measure(staged_design(16, 24, 0, rank=rank) for rank in curve.ranks)
    assert [one.error for one in measured] == pytest.approx(curve.errors, rel=1e-3)
    assert [one.loss for one in measured] == pytest.approx(curve.losses, rel=1e-3)


def test_more_rank_never_misses_more_of_the_fitted_rows():
    dense, inputs, metric = drawn(500)
    statistics = ActivationStatistics.of(inputs)
    moments = Moments(statistics, statistics, statistics, metric)
    for weighted in (True, False):
        curve = low_rank_curve(*dense, moments, weighted=weighted, predicts=weighted)
        assert list(curve.losses) == sorted(curve.losses, reverse=True)
        assert all(loss > 0 for loss in curve.losses)


@pytest.mark.parametrize("kind", ["zero weight", "one row", "dead inputs", "constant"])
def test_degenerate_layers_have_finite_curves(kind):
    dense, inputs, metric = drawn(200)
    if kind == "zero weight":
        dense = (torch.zeros_like(dense[0]), dense[1])
    inputs = {
        "one row": inputs[:1],
        "dead inputs": inputs * (torch.arange(16) % 3 > 0),
        "constant": torch.ones(50, 16),
    }.get(kind, inputs)
    statistics = ActivationStatistics.of(inputs)
    curve = low_rank_curve(*dense, Moments(statistics, statistics, statistics, metric), weighted=True, predicts=True)
    assert all(0 <= number < float("inf") for number in (*curve.errors, *curve.losses))


def test_ranks_are_smaller_than_dense_and_aligned_where_they_are_many():
    assert candidate_ranks(16, 24) == list(range(1, 10))
    assert candidate_ranks(1, 1) == []
    ranks = candidate_ranks(1024, 768)
    assert ranks[:DENSELY] == list(range(1, DENSELY + 1))
    assert ranks[DENSELY:] == list(range(DENSELY + 8, 439, 8))
    assert max(ranks) * (1024 + 768) < 1024 * 768


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", ["spm", "sparse24", "lowrank"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 0.99])
def test_designs_keep_to_their_parameters(kind, share, beside):
    parameters = int(share * 256 * 384)
    designs = designs_of(kind, 256, 384, parameters, beside_low_rank=beside and kind != "lowrank")
    assert len(set(designs)) == len(designs)
    for design in designs:
        assert design.parameter_count(bias=False) <= parameters
        assert design.term(kind)
        assert beside or len(design.terms) == 1
    if kind == "spm" and share >= 0.3:
        assert any(len(design.terms) == 2 for design in designs) == beside
        alone = max(design.parameter_count(bias=False) for design in designs)
        assert alone > 0.5 * parameters


def test_designs_of_a_fixed_size_leave_low_rank_the_rest():
    assert standing_designs_of("lowrank", 256, 384) == standing_designs_of("spm", 256, 384) == []
    (bare,) = standing_designs_of("sparse24", 256, 384)
    size = bare.parameter_count(bias=False)
    assert designs_of("sparse24", 256, 384, size, beside_low_rank=True) == []
    (both,) = designs_of("sparse24", 256, 384, size + 5 * (256 + 384) + 1, beside_low_rank=True)
    assert both.term("sparse24") == bare.terms[0]
    assert both.term("lowrank").rank == 5


def test_a_candidate_is_named_by_its_terms():
    terms = ({"kind": "spm", "width": 24, "stages": 5, "variant": "general", "block": 1}, {"kind": "lowrank", "rank": 2})
    candidate = Candidate(terms, 0.5, 0.1)
    assert candidate.kinds == ("spm", "lowrank")
    assert candidate.design(16, 24) == staged_design(16, 24, 5, rank=2)
