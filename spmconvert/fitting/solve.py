"""Fit an SPM layer to a dense one: weighted least squares through the merged form, with exact bias correction.

Minimised is E‖(W - S)(x - μ)‖² = ‖R (W - S)ᵀ‖² with RᵀR = Σ, the centred second moment of the inputs, so the rows of R
are the only tokens, in_features of them however long the calibration text was. The mean goes into the bias exactly,
b' = b + (W - S) μ. Target and rows are scaled to unit size first, so that one step size serves every layer.

Where an ``OutputMetric`` says how much output directions matter, the squared error is taken in that metric.

A companion is no unknown of the solver. Given the stages, the best one is the truncated SVD of what they leave, so the
error is what that SVD leaves, a function of the stages alone (variable projection, Golub and Pereyra 1973); its gradient
needs only the left singular vectors, which follow the stages by one step of subspace iteration each. Stepping the
companion's factors with the stages instead loses the SVD in the first steps and is slow to find it again. Weighted loss on
two matrices of a small GPT-2 after 120 iterations, one pass of stages, that of low rank alone at equal size being 1:

    share of the parameters          10 %           25 %           50 %
    companion stepped                0.80, 0.65     1.11, 1.11     1.62, 1.67
    companion eliminated             0.78, 0.64     0.90, 0.77     0.93, 0.91

The solver is Adam with a cosine step size, then a few L-BFGS iterations; the best point seen is kept, starting with the
start itself, so a fit is never worse than its start or than the zero matrix. Compared on ``encoder.layer.2`` of
all-MiniLM-L6-v2, intermediate.dense (384 -> 1536, 11 stages), two cores, relative error on the fitted centred outputs:

    Adam, 100 / 300 / 600 / 1000 steps of 0.1           0.598 in 1.0 s / 0.567 in 3.7 s / 0.558 in 5.6 s / 0.554 in 11 s
    Adam 300, then L-BFGS 200 (history 10)              0.564 in 6.5 s
    L-BFGS alone, 400 iterations, history 10 / 40       0.596 in 8.1 s / 0.591 in 5.3 s
    closed-form sweeps over the stages (2n x 2n solves) 0.662 after 3 sweeps, 20 s; after Adam 300 a sweep gains 0.0006
    a start near the identity instead of rotations      0.566 instead of 0.565 (Adam 300)

L-BFGS needs the loss scaled up: at 1e-6 curvature pairs fall below torch's threshold and every step is gradient descent.
Step sizes of 0.05 and 0.2 end at 0.571 and 0.572 after 300 steps.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.errors import FitError
from spmconvert.fitting.lowrank import covariance_root, factors_on, left_singular_vectors, metric_weighted
from spmconvert.fitting.metric import OutputMetric
from spmconvert.fitting.start import can_factorise, hierarchical_start_, random_start_
from spmconvert.fitting.statistics import ActivationStatistics
from spmconvert.operator.linear import SPMLinear

STEP_SIZE = 0.1
# share of the iterations that L-BFGS gets at the end
POLISH_SHARE = 0.1
# a start this close to its target is exact up to rounding
EXACT = 1e-10
# of subspace iteration, after which the companion is the truncated SVD but for vectors of nearly equal energy
SETTLING_STEPS = 4
_STAGES = ("weight", "scale_in", "scale_out")


@dataclass(frozen=True)
class LayerError:
    """How far a replacement is from the dense layer on some rows.

    Attributes:
        relative: E‖y - ŷ‖² / E‖y‖².
        centred: E‖y - ŷ‖² / E‖y - E y‖².
    """

    relative: float
    centred: float


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Attributes:
        start: relative centred error of the start on the fitted rows, in the metric of the fit.
        end: the same, of the layer that was kept.
        iterations: iterations that were run.
        seconds: time it took.
    """

    start: float
    end: float
    iterations: int
    seconds: float


class _Problem:
    """The scaled least-squares problem of one layer; the parameters of its stages are the unknowns."""

    def __init__(self, layer: SPMLinear, weight: Tensor, root: Tensor, metric: OutputMetric | None) -> None:
        target = root @ weight.float().t()
        self.layer, self.metric = layer, metric
        self.input_size = root.square().mean().sqrt().clamp_min(1e-30)
        self.target_size = target.square().mean().sqrt()
        self.rows = root / self.input_size
        self.target = target / self.target_size
        # left singular vectors of what the companion takes over, in the metric: [out_features, rank]
        self.basis: Tensor | None = None
        self.zero = self._weighted(self.target).square().sum()
        self.parameters = [p for name, p in layer.named_parameters() if name in _STAGES]

    def loss(self, *, follow: bool = False) -> Tensor:
        """Squared error in the metric, relative to the target: the zero matrix has 1.

        Args:
            follow: let the companion follow the stages by a step of subspace iteration.
        """
        remainder = self._weighted(self.target - self._output())
        if follow and self.basis is not None:
            self.basis = _subspace_step(remainder.detach(), self.basis)
        return self._uncompanioned(remainder).square().sum() / self.zero

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs if self.metric is None else self.metric.root(outputs)

    def _uncompanioned(self, outputs: Tensor) -> Tensor:
        """What the companion leaves of weighted outputs."""
        return outputs if self.basis is None else outputs - (outputs @ self.basis) @ self.basis.t()

    def _output(self) -> Tensor:
        """Outputs of the stages alone."""
        with _bare(self.layer):
            output: Tensor = self.layer(self.rows)
        return output

    @torch.no_grad()
    def settle_(self) -> None:
        """Take the companion to where the stages as they are want it."""
        if self.basis is not None:
            remainder = self._weighted(self.target - self._output())
            for _ in range(SETTLING_STEPS):
                self.basis = _subspace_step(remainder, self.basis)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> None:
        """Multiply the matrix of the stages by a positive factor."""
        self.layer.scale_out.mul_(factor)

    @torch.no_grad()
    def fit_size_(self) -> None:
        """Give the stages the size that fits best what the companion leaves."""
        stages, wanted = (self._uncompanioned(self._weighted(one)) for one in (self._output(), self.target))
        self.layer.scale_out.mul_((stages * wanted).sum() / stages.square().sum().clamp_min(1e-30))

    def snapshot(self) -> list[Tensor]:
        """A copy of the unknowns."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore_(self, values: list[Tensor]) -> None:
        """Put a snapshot back."""
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


@contextmanager
def _bare(layer: SPMLinear) -> Iterator[None]:
    """The layer without bias and companion."""
    kept = layer.bias, layer.low_rank_in, layer.low_rank_out
    layer.bias = layer.low_rank_in = layer.low_rank_out = None
    try:
        yield
    finally:
        layer.bias, layer.low_rank_in, layer.low_rank_out = kept


def _subspace_step(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns [features, rank] that hold more of the energy of rows [rows, features]; never less."""
    found: Tensor = torch.linalg.qr(rows.t() @ (rows @ basis))[0]
    return found


class _Best:
    """The best point seen so far."""

    def __init__(self, problem: _Problem, loss: float) -> None:
        self.problem, self.loss, self.values, self.basis = problem, loss, problem.snapshot(), problem.basis

    def offer(self, loss: float) -> None:
        if loss < self.loss:
            self.loss, self.values, self.basis = loss, self.problem.snapshot(), self.problem.basis

    def restore_(self) -> None:
        self.problem.restore_(self.values)
        self.problem.basis = self.basis
        self.problem.settle_()


def fit_(
    layer: SPMLinear,
    weight: Tensor,
    bias: Tensor | None,
    statistics: ActivationStatistics,
    *,
    iterations: int = 300,
    seed: int = 0,
    warm: bool = False,
    metric: OutputMetric | None = None,
) -> FitResult:
    """Fit a float32 layer in place, bias included.

    Args:
        layer: the layer to fill; with a bias unless the statistics have zero mean and ``bias`` is None.
        weight: dense weight [out_features, in_features].
        bias: dense bias [out_features], or None.
        statistics: moments of the layer's inputs.
        iterations: most iterations of the solver; 0 keeps the start.
        seed: seed of the start.
        warm: start from the parameters the layer has, instead of a fresh start.
        metric: weighs the outputs' errors; None counts all directions alike.

    Raises:
        FitError: when weight or statistics are not finite.
    """
    began = time.perf_counter()
    if not (weight.isfinite().all() and statistics.scatter.isfinite().all() and statistics.mean.isfinite().all()):
        raise FitError("weight or input statistics are not finite; a least-squares fit needs finite numbers")
    root = covariance_root(statistics.covariance)
    problem = _Problem(layer, weight, root, metric)
    result = (1.0, 1.0, 0)
    if problem.zero > 0:
        with torch.enable_grad():
            result = _solve(problem, weight, root, iterations, seed, warm)
    else:
        with torch.no_grad():
            layer.scale_out.zero_()
    _balance_companion_(layer)
    correct_bias_(layer, weight, bias, statistics)
    return FitResult(*result, seconds=time.perf_counter() - began)


def _solve(
    problem: _Problem, weight: Tensor, root: Tensor, iterations: int, seed: int, warm: bool
) -> tuple[float, float, int]:
    layer = problem.layer
    # the layer's matrix maps scaled rows to scaled targets while the solver works
    unscale = problem.target_size / problem.input_size
    if warm:
        problem.rescale_(1 / unscale)
        with _bare(layer), torch.no_grad():
            stages = layer.to_dense() * unscale
        problem.basis = _companion_basis(problem, weight - stages, root)
    else:
        _fresh_start_(problem, weight, root, unscale, seed)
    with torch.no_grad():
        start = problem.loss().item()
    best = _Best(problem, start)
    done = 0
    # without stages the start is the best matrix of its rank; the diagonal is worth less than half a percent of the rest
    if start > EXACT and iterations and layer.geometry.stages:
        polish = max(1, round(POLISH_SHARE * iterations))
        _adam(problem, best, iterations - polish)
        best.restore_()
        _polish(problem, best, polish)
        done = iterations
    best.restore_()
    with torch.no_grad():
        end = problem.loss().item()
    problem.rescale_(unscale)
    if end < 1:
        _set_companion_(problem, weight)
        return start, end, done
    # nothing found that beats predicting the mean output
    with torch.no_grad():
        layer.scale_out.zero_()
        if layer.low_rank_out is not None:
            layer.low_rank_out.zero_()
    return start, 1.0, done


def _companion_basis(problem: _Problem, weight: Tensor, root: Tensor) -> Tensor | None:
    """Left singular vectors of a matrix [out_features, in_features], as many as the companion has ranks."""
    rank, metric = problem.layer.geometry.rank, problem.metric
    return left_singular_vectors(metric_weighted(weight.float(), metric), root, rank) if rank else None


@torch.no_grad()
def _set_companion_(problem: _Problem, weight: Tensor) -> None:
    """Write what the basis takes over of the weight, the stages taken off, into the companion."""
    layer = problem.layer
    if problem.basis is None or layer.low_rank_in is None or layer.low_rank_out is None:
        return
    with _bare(layer):
        rest = weight.float() - layer.to_dense()
    left, right = factors_on(problem.basis, rest, problem.metric)
    layer.low_rank_out.copy_(left)
    layer.low_rank_in.copy_(right)


@torch.no_grad()
def _balance_companion_(layer: SPMLinear) -> None:
    """Give both factors of every rank the same norm: steps of one size suit them both when they are trained further.

    A weighted fit leaves them orders of magnitude apart, and a finetune at 3e-3 then never goes below its start.
    """
    if layer.low_rank_in is not None and layer.low_rank_out is not None:
        inward, outward = layer.low_rank_in.norm(dim=1), layer.low_rank_out.norm(dim=0)
        ratio = (inward / outward).sqrt()
        ratio = ratio.where(ratio.isfinite() & (ratio > 0), 1.0)
        layer.low_rank_out.mul_(ratio)
        layer.low_rank_in.div_(ratio[:, None])


def _fresh_start_(problem: _Problem, weight: Tensor, root: Tensor, unscale: Tensor, seed: int) -> None:
    layer = problem.layer
    problem.basis = _companion_basis(problem, weight, root)
    if problem.basis is None and can_factorise(layer.geometry):
        hierarchical_start_(layer, weight.float() / unscale)
        with torch.no_grad():
            if problem.loss().item() < EXACT:
                return
    random_start_(layer, seed)
    problem.fit_size_()


def _adam(problem: _Problem, best: _Best, steps: int) -> None:
    layer = problem.layer
    # mixers are stepped relative to their size; diagonals and angles have size one by construction
    size = layer.weight.detach().square().mean().sqrt().item() * math.sqrt(2)
    mixers = STEP_SIZE * (size or 1.0) if layer.geometry.variant == "general" else STEP_SIZE
    diagonals = [layer.scale_in, layer.scale_out]
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": mixers}, {"params": diagonals, "lr": STEP_SIZE}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(follow=True)
        best.offer(loss.item())
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        best.offer(problem.loss(follow=True).item())


def _polish(problem: _Problem, best: _Best, steps: int) -> None:
    optimizer = torch.optim.LBFGS(
        problem.parameters,
        max_iter=steps,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = problem.loss()
        best.offer(loss.item())
        (loss * 1e6).backward()
        return loss.item() * 1e6

    optimizer.step(closure)


@torch.no_grad()
def correct_bias_(layer: SPMLinear, weight: Tensor, bias: Tensor | None, statistics: ActivationStatistics) -> None:
    """Set the bias to b + (W - S) μ, in place, so that the mean output is exact."""
    if layer.bias is None:
        return
    difference = weight.double() - layer.to_dense().double()
    corrected = difference @ statistics.mean.double()
    layer.bias.copy_(corrected if bias is None else corrected + bias.double())


@torch.no_grad()
def measure_error(
    dense: tuple[Tensor, Tensor | None], replacement: tuple[Tensor, Tensor | None], statistics: ActivationStatistics
) -> LayerError:
    """Error of a replacement's (weight, bias) against a dense layer's, on the rows behind the statistics."""
    mean, covariance = statistics.mean.double(), statistics.covariance.double()

    def affine(layer: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        weight = layer[0].double()
        offset = weight @ mean
        return weight, offset if layer[1] is None else offset + layer[1].double()

    weight, output_mean = affine(dense)
    other, other_mean = affine(replacement)
    difference = weight - other
    missed = (difference @ covariance * difference).sum() + (output_mean - other_mean).square().sum()
    varying = (weight @ covariance * weight).sum()
    total = varying + output_mean.square().sum()
    return LayerError((missed / total.clamp_min(1e-300)).item(), (missed / varying.clamp_min(1e-300)).item())


def fit_linear(
    dense: nn.Linear,
    statistics: ActivationStatistics | None = None,
    *,
    layer_class: type[SPMLinear] = SPMLinear,
    iterations: int = 300,
    seed: int = 0,
    **design: Any,
) -> tuple[Any, FitResult]:
    """Build and fit the replacement of one nn.Linear.

    Args:
        dense: the layer to replace.
        statistics: moments of its inputs; None fits in the Frobenius norm and leaves the bias as it is.
        layer_class: SPMLinear or a subclass.
        iterations: most iterations of the solver.
        seed: seed of the start.
        **design: ``stages``, ``variant``, ``block``, ``rank`` of the layer.

    Returns:
        The layer, in the dtype and on the device of the dense one, and what the fit did.
    """
    weight = dense.weight.detach()
    bias: Tensor | None = dense.bias
    has_bias = bias is not None or statistics is not None
    layer = layer_class(dense.in_features, dense.out_features, has_bias, device=weight.device, **design)
    moments = statistics or ActivationStatistics.isotropic(dense.in_features)
    result = fit_(layer, weight, bias, moments.to(weight.device), iterations=iterations, seed=seed)
    return layer.to(weight.dtype), result
