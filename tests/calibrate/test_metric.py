"""The reduced curvature against the full matrix."""

import pytest
import torch

from spmconvert.calibrate.metric import DAMPING, DIRECTIONS, OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.solver import fit_
from spmconvert.operator.factors import covariance_root, truncated_svd
from spmconvert.operator.linear import SPMLinear


def curvature(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(size, rank, generator=generator) * torch.logspace(0, -2, rank)
    return directions @ directions.t() / rank


def test_energy_is_that_of_the_full_matrix_where_all_directions_are_kept():
    full = curvature(24, 40) + 0.2 * torch.eye(24)
    metric = OutputMetric.of(full)
    outputs = torch.randn(7, 24)
    expected = (outputs @ full * outputs).sum()
    torch.testing.assert_close(metric.energy(outputs), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.root(outputs).square().sum(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.inverse_root(metric.root(outputs)), outputs, rtol=1e-3, atol=1e-4)


def test_trace_is_kept_and_no_direction_is_free():
    full = curvature(DIRECTIONS + 60, 400) + 0.1 * torch.eye(DIRECTIONS + 60)
    metric = OutputMetric.of(full)
    found = metric.energy(torch.eye(len(full)))
    torch.testing.assert_close(found, full.diagonal().sum(), rtol=1e-3, atol=0)
    few = OutputMetric.of(curvature(50, 2))
    assert few.level == pytest.approx(DAMPING * curvature(50, 2).diagonal().mean().item(), rel=1e-5)
    assert few.values.min() >= few.level


def energies(metric: OutputMetric, difference: torch.Tensor, root: torch.Tensor) -> float:
    return metric.energy(root @ difference.t()).item()


def test_weighted_svd_is_the_best_of_its_rank():
    torch.manual_seed(0)
    weight, rows = torch.randn(30, 20), torch.randn(200, 20) @ torch.randn(20, 20)
    root = covariance_root(ActivationStatistics.of(rows).covariance)
    metric = OutputMetric.of(curvature(30, 12))
    left, right = truncated_svd(weight, root, 6, metric)
    plain_left, plain_right = truncated_svd(weight, root, 6)
    best = energies(metric, weight - left @ right, root)
    assert best < 0.8 * energies(metric, weight - plain_left @ plain_right, root)
    for _ in range(20):
        moved = weight - (left + 1e-2 * torch.randn_like(left)) @ (right + 1e-2 * torch.randn_like(right))
        assert energies(metric, moved, root) > best * (1 - 1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_weighted_fit_costs_the_model_less_than_a_plain_one(rank):
    torch.manual_seed(0)
    weight, rows = torch.randn(32, 32) / 6, torch.randn(300, 32)
    statistics = ActivationStatistics.of(rows)
    root = covariance_root(statistics.covariance)
    metric = OutputMetric.of(curvature(32, 6))
    found = []
    for chosen in (metric, None):
        layer = SPMLinear(32, 32, stages=5, rank=rank)
        result = fit_(layer, weight, None, statistics, iterations=120, seed=1, metric=chosen)
        found.append(energies(metric, weight - layer.to_dense().detach(), root))
    assert found[0] < 0.9 * found[1]
    assert result.end <= result.start


def test_factors_of_a_weighted_fit_have_equal_norms():
    torch.manual_seed(0)
    weight, rows = torch.randn(24, 32), torch.randn(300, 32)
    layer = SPMLinear(32, 24, stages=0, rank=5)
    fit_(layer, weight, None, ActivationStatistics.of(rows), metric=OutputMetric.of(1e-6 * curvature(24, 6)))
    torch.testing.assert_close(layer.lowrank.down.weight.norm(dim=1), layer.lowrank.up.weight.norm(dim=0))
