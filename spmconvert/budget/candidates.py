"""What a layer loses at every size: candidates of all structures, measured on the rows that choose designs.

Candidates are points on a few shares of the dense parameters. Low-rank ones come from a single decomposition; those with
stages are fitted with few iterations, which is a slight handicap against low rank and shows the same order of structures
as a full fit. The loss is the predicted one where an ``OutputMetric`` says what errors cost, else the relative error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.error import measure_error
from spmconvert.operator.factors import covariance_root, rank_at, truncated_svd
from spmconvert.fit.solver import fit_
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear

Structure = Literal["spm", "block", "companion", "lowrank"]
RANK_SHARES = (0.02, 0.03, 0.04, 0.055, 0.07, 0.085, 0.1, 0.12, 0.15, 0.18, 0.21, 0.25, 0.3, 0.35, 0.42, 0.5, 0.6, 0.75)
COMPANION_SHARES = (0.05, 0.075, 0.1, 0.15, 0.25, 0.37, 0.5, 0.75)
# share of the parameters that a single stage of wide blocks takes beside a companion
WIDE_BLOCK_SHARE = 1 / 3
PASSES = (1, 2)


@dataclass(frozen=True)
class Candidate:
    """One way to build a layer.

    Attributes:
        stages: number of stages, 0 for low rank alone.
        block: coordinates a block.
        rank: rank of the companion.
        error: E‖y - ŷ‖² / E‖y‖² on the rows that choose.
        loss: predicted loss of the model, or the error where nothing predicts one.
    """

    stages: int
    block: int
    rank: int
    error: float
    loss: float

    def geometry(self, in_features: int, out_features: int) -> Geometry:
        """The candidate as a layer of the given size."""
        return Geometry.create(in_features, out_features, self.stages, "general", self.block, self.rank)


def candidate_geometries(in_features: int, out_features: int, structure: Structure) -> list[Geometry]:
    """All candidates of a structure that have fewer parameters than the dense layer, each once."""
    builders = {"spm": _plain, "block": _blocks, "companion": _with_companion, "lowrank": _low_rank}
    geometries = builders[structure](in_features, out_features)
    dense = in_features * out_features
    return [g for g in dict.fromkeys(geometries) if g.parameter_count(bias=False) < dense]


def measure_curve(
    geometries: Sequence[Geometry],
    dense: tuple[Tensor, Tensor | None],
    fitted: ActivationStatistics,
    choosing: ActivationStatistics,
    metric: OutputMetric | None,
    iterations: int,
    *,
    weighted: bool,
) -> list[Candidate]:
    """Build every candidate and measure it.

    Args:
        geometries: what to build.
        dense: weight [out_features, in_features] and bias of the dense layer.
        fitted: moments of the inputs that are fitted.
        choosing: moments of the inputs that measure.
        metric: what errors of the outputs cost; None for the relative error.
        iterations: most iterations of a fit with stages.
        weighted: whether the metric weighs the fits, too, as ``fit.output_weighting`` does.
    """
    fit_metric = metric if weighted else None
    weight, bias = dense[0].float(), dense[1]
    ranks = [g.rank for g in geometries if not g.stages]
    factors = truncated_svd(weight, covariance_root(fitted.covariance), max(ranks), fit_metric) if ranks else None
    candidates = []
    for geometry in geometries:
        if geometry.stages or factors is None:
            layer = SPMLinear(
                geometry.in_features, geometry.out_features, device=weight.device, dtype=torch.float32,
                stages=geometry.stages, block=geometry.block, rank=geometry.rank,
            )  # fmt: skip
            fit_(layer, weight, bias, fitted, iterations=iterations, metric=fit_metric)
            matrix = layer.to_dense().detach()
        else:
            matrix = factors[0][:, : geometry.rank] @ factors[1][: geometry.rank]
        other = (matrix, fitted.corrected_bias(weight, matrix, bias))
        error = measure_error((weight, bias), other, choosing)
        loss = error.relative if metric is None else predicted_loss(metric, (weight, bias), other, choosing)
        candidates.append(Candidate(geometry.stages, geometry.block, geometry.rank, error.relative, loss))
    return candidates


def predicted_loss(
    metric: OutputMetric,
    dense: tuple[Tensor, Tensor | None],
    replacement: tuple[Tensor, Tensor | None],
    statistics: ActivationStatistics,
) -> float:
    """Second-order loss of a model with a replacement's (weight, bias) in the place of a dense layer's."""
    difference = dense[0].float() - replacement[0].float()
    shift = difference @ statistics.mean
    for (_, bias), sign in ((dense, 1), (replacement, -1)):
        shift = shift if bias is None else shift + sign * bias.float()
    rows = covariance_root(statistics.covariance) @ difference.t()
    return (metric.energy(rows) + metric.energy(shift[None])).item()


def _plain(in_features: int, out_features: int) -> list[Geometry]:
    period = Geometry.create(in_features, out_features).stages
    return [Geometry.create(in_features, out_features, passes * period) for passes in PASSES]


def _blocks(in_features: int, out_features: int) -> list[Geometry]:
    sizes = (2**power for power in range(1, int(math.log2(min(in_features, out_features)))))
    return [Geometry.create(in_features, out_features, None, "general", block) for block in sizes]


def _with_companion(in_features: int, out_features: int) -> list[Geometry]:
    geometries = []
    for share in COMPANION_SHARES:
        parameters = int(share * in_features * out_features)
        bases = [Geometry.create(in_features, out_features)]
        wanted = WIDE_BLOCK_SHARE * parameters / (2 * max(in_features, out_features))
        block = 2 ** round(math.log2(max(1.0, wanted)))
        if 2 <= block <= min(in_features, out_features) // 2:
            bases.append(Geometry.create(in_features, out_features, 1, "general", block))
        for base in bases:
            rank = rank_at(parameters - base.parameter_count(bias=False), in_features, out_features)
            if rank > 0:
                geometries.append(replace(base, rank=rank))
    return geometries


def _low_rank(in_features: int, out_features: int) -> list[Geometry]:
    empty = Geometry.create(in_features, out_features, 0)
    ranks = (
        rank_at(int(share * in_features * out_features) - 2 * empty.width, in_features, out_features)
        for share in RANK_SHARES
    )
    return [replace(empty, rank=rank) for rank in dict.fromkeys(ranks) if rank > 0]
