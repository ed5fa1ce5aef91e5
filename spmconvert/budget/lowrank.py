"""What low rank loses at every rank, from one decomposition.

The whitened truncated SVDs of a weight are nested, all on one basis. With D_i what direction i carries on the rows that
choose, the error of rank r is the sum over all pairs i, j > r of ⟨D_i, D_j⟩, so all of them are the tails of one matrix of
inner products, in the metric of the loss and in the plain norm alike. Ranks are whole numbers; above
``DENSELY`` only those that ``ALIGNED`` divides, which are the fast ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.store import Moments
from spmconvert.operator.factors import covariance_root, left_singular_vectors, metric_weighted
from spmconvert.operator.terms.lowrank import ALIGNED

# every rank up to it is a candidate
DENSELY = 64


@dataclass(frozen=True)
class LowRankCurve:
    """Errors and losses of one layer by rank.

    Attributes:
        ranks: in increasing order.
        errors: E‖y - ŷ‖² / E‖y‖² of each on the rows that choose.
        losses: predicted loss of the model of each, or the error where nothing predicts one.
    """

    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    losses: tuple[float, ...]


def candidate_ranks(in_features: int, out_features: int) -> list[int]:
    """Ranks whose factors are smaller than the dense matrix."""
    largest = (in_features * out_features - 1) // (in_features + out_features)
    return [rank for rank in range(1, largest + 1) if rank <= DENSELY or rank % ALIGNED == 0]


@torch.no_grad()
def low_rank_curve(
    weight: Tensor, bias: Tensor | None, moments: Moments, *, weighted: bool, predicts: bool
) -> LowRankCurve:
    """Measure all ranks.

    Args:
        weight: dense weight [out_features, in_features], float32.
        bias: its bias [out_features], or None.
        moments: with ``choosing``; a metric where ``weighted`` or ``predicts``.
        weighted: whether the metric weighs the fit, too.
        predicts: whether losses are taken in the metric.
    """
    choosing = moments.choosing
    assert choosing is not None
    out_features, in_features = weight.shape
    fit_metric = moments.metric if weighted else None
    root = covariance_root(moments.fitted.covariance)
    weighted_weight = metric_weighted(weight, fit_metric)
    basis = left_singular_vectors(weighted_weight, root, min(weight.shape))
    carried = basis.t() @ weighted_weight
    outputs = torch.cat([carried @ _exact_root(choosing.covariance).t(), _shift(carried, moments)[:, None]], dim=1)
    inner = outputs @ outputs.t()
    directions = basis if fit_metric is None else fit_metric.inverse_root(basis.t()).t()
    ranks = candidate_ranks(in_features, out_features)
    total = _output_energy(weight, bias, moments)
    errors = [value / total for value in _tails(inner, directions.t() @ directions, ranks)]
    losses = errors
    if predicts and moments.metric is not None:
        losses = _tails(inner, _in_metric(directions, moments.metric), ranks)
    return LowRankCurve(tuple(ranks), tuple(errors), tuple(losses))


def _exact_root(covariance: Tensor) -> Tensor:
    """A matrix R with RᵀR = covariance, without a ridge: what is measured is not regularised."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp_min(0).sqrt()).t().float()


def _shift(carried: Tensor, moments: Moments) -> Tensor:
    """How far the mean output of every direction moves where the choosing rows' mean is not the fitted one."""
    assert moments.choosing is not None
    return carried @ (moments.choosing.mean - moments.fitted.mean)


def _output_energy(weight: Tensor, bias: Tensor | None, moments: Moments) -> float:
    """E‖y‖² on the choosing rows."""
    choosing = moments.choosing
    assert choosing is not None
    wide = weight.double()
    mean = wide @ choosing.mean.double()
    mean = mean if bias is None else mean + bias.double()
    return ((wide @ choosing.covariance.double() * wide).sum() + mean.square().sum()).clamp_min(1e-300).item()


def _in_metric(directions: Tensor, metric: OutputMetric) -> Tensor:
    """Inner products of directions [out_features, ranks] in a metric on the outputs."""
    rooted = metric.root(directions.t())
    return rooted @ rooted.t()


def _tails(inner: Tensor, products: Tensor, ranks: Sequence[int]) -> list[float]:
    """For every rank r the sum over i, j >= r of the two matrices' elementwise product."""
    pairs = (inner.double() * products.double()).flip(0, 1)
    sums = pairs.cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
    return [sums[rank].item() if rank < len(sums) else 0.0 for rank in ranks]
