"""One planned layer: fit it, store it in its dtype, and measure it beside the baseline of equal size."""

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.calibrate.store import Moments
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.errors import CorruptCheckpointError, FitError
from spmconvert.fit.aim import Aim, FitResult
from spmconvert.fit.batched_solver import fit_batch_
from spmconvert.fit.error import LayerError, measure_error
from spmconvert.fit.sequential import Regression
from spmconvert.fit.solver import fit_aim_
from spmconvert.model.opening import shown_together
from spmconvert.model.swap import layer_from_spec
from spmconvert.operator.factors import RIDGE, covariance_root, damped_root, rank_at, truncated_svd
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import LayerPlan

# centred error of a layer that puts out its mean whatever goes in
WORTHLESS = 1.0
# what is warned about: an error that rounding multiplies by this, or so many times that of SVD of the same size
ROUNDING_LOSS, FAR_ABOVE = 1.5, 2.0
# what begins the warning of a layer whose moments had to be damped
SINGULAR = "second moments of its inputs are singular"
# of an expert that was not chosen once
IDLE = "no calibration token came to it, fitted to what the other experts of its layer see"
# differences below it mean nothing
TINY = 1e-3


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer; an error is E‖y - ŷ‖² / E‖y‖².

    Without calibration data all errors are ‖W - S‖² / ‖W‖² in the Frobenius norm.

    Attributes:
        name: module name.
        in_features: size of the input.
        out_features: size of the output.
        design: the terms in words.
        dense_parameters: parameters before, bias included.
        parameters: parameters after, bias included.
        fitted_error: error on the fitted rows.
        error: error on the held-out rows.
        centred_error: the same relative to E‖y - E y‖².
        baseline_rank: rank of the whitened truncated SVD that has no more parameters than the new layer.
        baseline_error: its error on the held-out rows.
        baseline_centred_error: the same relative to E‖y - E y‖².
        seconds: time of the fit.
        warning: what its user should know of it, or an empty string.
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
    warning: str = ""


_FORM: TypeAdapter[LayerRecord] = TypeAdapter(LayerRecord)


def stored_record(entry: Any) -> LayerRecord:
    """A record as an unfinished run keeps it.

    Raises:
        CorruptCheckpointError: when it is none.
    """
    try:
        return _FORM.validate_python(entry)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CorruptCheckpointError(
            f"the record of a finished layer is damaged at {where!r}; discard the unfinished run with --force"
        ) from None


def shown(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Records as they are shown: experts of a projection are one line, with mean errors and all of their parameters."""
    lines = []
    for name, positions in shown_together([record.name for record in records]).items():
        own = [records[position] for position in positions]
        if len(own) == 1:
            lines.append(own[0])
            continue
        means: dict[str, Any] = {
            key: statistics.fmean(getattr(record, key) for record in own)
            for key in ("fitted_error", "error", "centred_error", "baseline_error", "baseline_centred_error")
        }
        summed = ("dense_parameters", "parameters", "seconds")
        sums: dict[str, Any] = {key: sum(getattr(record, key) for record in own) for key in summed}
        warned = [record for record in own if record.warning]
        warning = f"{len(warned)} of {len(own)}: {warned[0].warning}" if warned else ""
        lines.append(replace(own[0], name=f"{name} ({len(own)})", warning=warning, **means, **sums))
    return lines


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
        FitError: when weight or statistics are not finite, or rounding to the stored dtype makes the layer worthless.
    """
    work = _Work.of(plan, weight, bias, moments, seed=seed, regression=regression)
    return work.finished(fit_aim_(work.aim, iterations=iterations))


def fit_layers(
    layers: Sequence[tuple[LayerPlan, Tensor, Tensor | None, Moments | None]], *, iterations: int, seed: int
) -> Iterator[tuple[SPMLinear, LayerRecord]]:
    """The same for layers of one shape that are solved together, one by one; the arguments of each as above."""
    works = [_Work.of(*layer, seed=seed) for layer in layers]
    results = fit_batch_([work.aim for work in works], iterations=iterations)
    for work, result in zip(works, results, strict=True):
        yield work.finished(result)


@dataclass(frozen=True)
class _Work:
    """One layer at work.

    Attributes:
        plan: what to build.
        dense: weight [out_features, in_features] and bias.
        known: what calibration says about its inputs.
        aim: what it is fitted to.
        ridge: what the second moments took to be factorised.
    """

    plan: LayerPlan
    dense: tuple[Tensor, Tensor | None]
    known: Moments
    aim: Aim
    ridge: float

    @classmethod
    def of(
        cls,
        plan: LayerPlan,
        weight: Tensor,
        bias: Tensor | None,
        moments: Moments | None,
        *,
        seed: int,
        regression: Regression | None = None,
    ) -> "_Work":
        """With a fresh layer; arguments as for ``fit_layer``."""
        known = (moments or Moments.isotropic(weight.shape[1])).to(weight.device)
        layer = layer_from_spec(plan.spec, device=weight.device).float()
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{plan.target.name}".encode()).digest()[:6])
        wanted = (weight, bias, known.fitted if plan.spec.bias else known.fitted.uncentred())
        if regression is not None:
            moved = regression.to(weight.device)
            wanted = (moved.weight, moved.bias, moved.inputs)
        root, ridge = damped_root(wanted[2].covariance)
        return cls(plan, (weight, bias), known, Aim(layer, *wanted, own_seed, known.metric, root), ridge)

    def finished(self, result: FitResult) -> tuple[SPMLinear, LayerRecord]:
        """The fitted layer as it is stored, and its record."""
        plan, dense, known, layer = self.plan, self.dense, self.known, self.aim.layer
        unrounded_error = measure_error(dense, (_matrix(layer), layer.held_bias), known.fitted)
        layer = layer.to(getattr(torch, plan.stored_dtype))
        stored = (_matrix(layer), layer.held_bias)
        left, right, baseline_bias = whitened_svd(plan.spec, *dense, known.fitted)
        error, baseline_error = (
            measure_error(dense, replacement, known.held_out) for replacement in (stored, (left @ right, baseline_bias))
        )
        fitted_error = measure_error(dense, stored, known.fitted)
        if not fitted_error.centred <= max(WORTHLESS, ROUNDING_LOSS * unrounded_error.centred):
            raise FitError(
                f"layer {plan.target.name} has an error of {unrounded_error.centred:.3g} and, rounded to "
                f"{plan.stored_dtype}, of {fitted_error.centred:.3g}; store it with --dtype float32, or leave it out with "
                "--ignore"
            )
        warning = _warning(fitted_error, unrounded_error, error, baseline_error, plan.stored_dtype)
        warning = warning or (IDLE if known.tokens == 0 else _damped(self.ridge))
        return layer, _record(plan, fitted_error, error, left.shape[1], baseline_error, result.seconds, warning)


def measured_again(
    record: LayerRecord, plan: LayerPlan, layer: SPMLinear, weight: Tensor, bias: Tensor | None, moments: Moments | None
) -> LayerRecord:
    """The record of a layer that changed after it was fitted, in the dtype in which it is stored; arguments as above."""
    known = (moments or Moments.isotropic(weight.shape[1])).to(weight.device)
    stored = (_matrix(layer), layer.held_bias)
    fitted, error = (measure_error((weight, bias), stored, rows) for rows in (known.fitted, known.held_out))
    baseline = LayerError(record.baseline_error, record.baseline_centred_error)
    lasting = record.warning if record.warning.startswith((SINGULAR, IDLE)) else ""
    return replace(
        record,
        fitted_error=fitted.relative,
        error=error.relative,
        centred_error=error.centred,
        warning=_warning(fitted, fitted, error, baseline, plan.stored_dtype) or lasting,
    )


def _damped(ridge: float) -> str:
    return f"{SINGULAR}, fitted with {ridge:.0e} of their mean added to the diagonal" if ridge > RIDGE else ""


def _warning(fitted: LayerError, unrounded: LayerError, error: LayerError, baseline: LayerError, stored_dtype: str) -> str:
    """What the user should know of a layer, the worst first."""
    if fitted.centred > ROUNDING_LOSS * unrounded.centred + TINY:
        return f"rounding to {stored_dtype} takes its error from {unrounded.centred:.3g} to {fitted.centred:.3g}"
    if error.centred > WORTHLESS:
        return "worse than its mean output alone"
    if error.relative > FAR_ABOVE * baseline.relative + TINY:
        return f"SVD of the same size has {error.relative / max(baseline.relative, TINY):.1f} times less error"
    return ""


def _record(
    plan: LayerPlan,
    fitted: LayerError,
    error: LayerError,
    rank: int,
    baseline: LayerError,
    seconds: float,
    warning: str,
) -> LayerRecord:
    return LayerRecord(
        name=plan.target.name,
        in_features=plan.target.in_features,
        out_features=plan.target.out_features,
        design=plan.spec.design.describe(),
        dense_parameters=plan.dense_parameters,
        parameters=plan.parameters,
        fitted_error=fitted.relative,
        error=error.relative,
        centred_error=error.centred,
        baseline_rank=rank,
        baseline_error=baseline.relative,
        baseline_centred_error=baseline.centred,
        seconds=round(seconds, 3),
        warning=warning,
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
    rank = rank_at(spec.design.parameter_count(bias=False), in_features, out_features)
    statistics = statistics if spec.bias else statistics.uncentred()
    left, right = truncated_svd(weight, covariance_root(statistics.covariance), rank)
    return left, right, statistics.corrected_bias(weight, left @ right, bias) if spec.bias else None


@torch.no_grad()
def _matrix(layer: SPMLinear) -> Tensor:
    """The matrix of a layer with its parameters as they are, float32."""
    identity = torch.eye(layer.in_features, dtype=torch.float32, device=layer.weight.device)
    wide: Tensor = layer(identity)
    return (wide if layer.held_bias is None else wide - layer.held_bias.float()).t()
