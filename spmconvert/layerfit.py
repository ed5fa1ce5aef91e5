"""One planned layer: fit it, store it in its dtype, and measure it beside the baseline of equal size."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.fitting.calibration import CalibrationRows
from spmconvert.fitting.error import LayerError, measure_error
from spmconvert.fitting.lowrank import covariance_root, rank_at, truncated_svd
from spmconvert.fitting.metric import OutputMetric
from spmconvert.fitting.solve import fit_
from spmconvert.fitting.statistics import ActivationStatistics, collect, statistics_bytes
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan import STATISTICS_BUDGET, LayerPlan
from spmconvert.sensitivity import gather_curvatures
from spmconvert.sequential import Regression
from spmconvert.surgery.swap import layer_from_spec


@dataclass(frozen=True)
class Moments:
    """What calibration rows say about one layer.

    Attributes:
        fitted: moments of its inputs on the rows that are fitted.
        held_out: the same on the rows that only measure.
        metric: what errors of its outputs cost, where that was asked for.
    """

    fitted: ActivationStatistics
    held_out: ActivationStatistics
    metric: OutputMetric | None = None

    @classmethod
    def isotropic(cls, in_features: int) -> "Moments":
        """What stands in for data when there is none."""
        moments = ActivationStatistics.isotropic(in_features)
        return cls(moments, moments)

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        metric = None if self.metric is None else self.metric.to(device)
        return Moments(self.fitted.to(device), self.held_out.to(device), metric)


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer; an error is E‖y - ŷ‖² / E‖y‖².

    Without calibration data all errors are ‖W - S‖² / ‖W‖² in the Frobenius norm.

    Attributes:
        name: module name.
        in_features: size of the input.
        out_features: size of the output.
        design: stages, variant, block and rank in words.
        dense_parameters: parameters before, bias included.
        parameters: parameters after, bias included.
        fitted_error: error on the fitted rows.
        error: error on the held-out rows.
        centred_error: the same relative to E‖y - E y‖².
        baseline_rank: rank of the whitened truncated SVD that has no more parameters than the new layer.
        baseline_error: its error on the held-out rows.
        baseline_centred_error: the same relative to E‖y - E y‖².
        seconds: time of the fit.
    """

    name: str
    in_features: int
    out_features: int
    design: str
    dense_parameters: int
    parameters: int
    fitted_error: float
    error: float
    centred_error: float
    baseline_rank: int
    baseline_error: float
    baseline_centred_error: float
    seconds: float


def fit_layer(
    plan: LayerPlan,
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments | None,
    *,
    iterations: int,
    seed: int,
    regression: Regression | None = None,
) -> tuple[SPMLinear, LayerRecord]:
    """Fit the replacement of one layer.

    Args:
        plan: what to build.
        weight: dense weight [out_features, in_features], on the device to fit on.
        bias: dense bias [out_features], or None.
        moments: input statistics, or None to fit in the Frobenius norm; their metric weighs the fit.
        iterations: most iterations of the solver.
        seed: the recipe's seed; every layer derives its own from it.
        regression: what the layer should do with the converted model's activations, in place of the dense layer;
            errors are still measured against the dense layer, on what the dense model feeds it.

    Returns:
        The layer, in the dtype in which it is stored, and its record.

    Raises:
        FitError: when weight or statistics are not finite.
    """
    known = (moments or Moments.isotropic(weight.shape[1])).to(weight.device)
    statistics = known.fitted
    layer = layer_from_spec(plan.spec, device=weight.device).float()
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{plan.target.name}".encode()).digest()[:6])
    aim = (weight, bias, statistics)
    if regression is not None:
        moved = regression.to(weight.device)
        aim = (moved.weight, moved.bias, moved.inputs)
    result = fit_(layer, *aim, iterations=iterations, seed=own_seed, metric=known.metric)
    layer = layer.to(getattr(torch, plan.stored_dtype))

    dense = (weight, bias)
    stored = (_rounded_matrix(layer), layer.bias)
    left, right, baseline_bias = whitened_svd(plan.spec, weight, bias, statistics)
    error, baseline_error = (
        measure_error(dense, replacement, known.held_out) for replacement in (stored, (left @ right, baseline_bias))
    )
    fitted_error = measure_error(dense, stored, statistics)
    return layer, _record(plan, fitted_error, error, left.shape[1], baseline_error, result.seconds)


def _record(
    plan: LayerPlan, fitted: LayerError, error: LayerError, rank: int, baseline: LayerError, seconds: float
) -> LayerRecord:
    return LayerRecord(
        name=plan.target.name,
        in_features=plan.target.in_features,
        out_features=plan.target.out_features,
        design=plan.spec.geometry.describe(),
        dense_parameters=plan.dense_parameters,
        parameters=plan.parameters,
        fitted_error=fitted.relative,
        error=error.relative,
        centred_error=error.centred,
        baseline_rank=rank,
        baseline_error=baseline.relative,
        baseline_centred_error=baseline.centred,
        seconds=round(seconds, 3),
    )


def whitened_svd(
    spec: LayerSpec, weight: Tensor, bias: Tensor | None, statistics: ActivationStatistics
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The baseline: whitened truncated SVD of the same size, with the same bias correction where there is a bias.

    Args:
        spec: the layer it is compared with.
        weight: dense weight [out_features, in_features].
        bias: dense bias [out_features], or None.
        statistics: moments of the layer's inputs, on the weight's device.

    Returns:
        U [out_features, rank], V [rank, in_features] with no more parameters than the layer's, and the bias.
    """
    out_features, in_features = weight.shape
    rank = rank_at(spec.geometry.parameter_count(bias=False), in_features, out_features)
    left, right = truncated_svd(weight, covariance_root(statistics.covariance), rank)
    return left, right, statistics.corrected_bias(weight, left @ right, bias) if spec.bias else None


@torch.no_grad()
def _rounded_matrix(layer: SPMLinear) -> Tensor:
    """The matrix of a layer with the parameters it is stored with, float32."""
    identity = torch.eye(layer.in_features, device=layer.weight.device)
    wide: Tensor = layer(identity)
    return (wide - layer.bias.float() if layer.bias is not None else wide).t()


def statistics_groups(layers: Sequence[LayerPlan], *, weighted: bool = False) -> Iterator[list[LayerPlan]]:
    """Cut the layers into runs whose statistics fit in memory together; each costs one calibration run."""
    group: list[LayerPlan] = []
    used = 0
    for layer in layers:
        size = 2 * statistics_bytes(layer.target.in_features)
        size += statistics_bytes(layer.target.out_features) if weighted else 0
        if group and used + size > STATISTICS_BUDGET:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


def gather_moments(
    model: Any,
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    report: Callable[[int, int], None],
    *,
    weighted: bool = False,
    seed: int = 0,
) -> dict[str, Moments]:
    """Run the calibration rows through the model and return the moments of the layers by name.

    Args:
        model: the dense model.
        layers: whose inputs are wanted.
        rows: fitted and held-out rows.
        report: told how many batches are through, and of how many.
        weighted: measure what errors of the outputs cost, too; takes a backward pass over the fitted rows.
        seed: seed of that measurement.
    """
    names = [layer.target.name for layer in layers]
    fitted_batches, held_out_batches = (-(-len(part) // rows.batch_size) for part in (rows.fitted, rows.held_out))
    total = (2 if weighted else 1) * fitted_batches + held_out_batches
    done = 0

    def counted(part: list[Tensor]) -> Iterator[dict[str, Any]]:
        nonlocal done
        for batch in rows.batches(part, model):
            yield batch
            done += 1
            report(done, total)

    fitted = collect(model, names, counted(rows.fitted))
    held_out = collect(model, names, counted(rows.held_out))
    curvatures = gather_curvatures(model, names, counted(rows.fitted), seed) if weighted else {}
    metrics = {name: OutputMetric.of(curvature) for name, curvature in curvatures.items()}
    return {name: Moments(fitted[name], held_out[name], metrics.get(name)) for name in names}
