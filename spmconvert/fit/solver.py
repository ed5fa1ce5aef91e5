"""Fit an SPM layer to a dense one: weighted least squares through the merged form, with exact bias correction.

The problem itself is in ``problem``. The mean goes into the bias exactly, b' = b + (W - S) μ.

The solver is Adam with a cosine step size, then a few L-BFGS iterations; the best point seen is kept, starting with the
start itself, so a fit is never worse than the zero matrix. Adam comes first because it gets farther in the same time: 0.567
of the centred outputs' energy is left after 3.7 s where L-BFGS alone leaves 0.596 after 8.1 s (other step sizes, starts and
closed-form sweeps: benchmarks/results/choices.md).

L-BFGS needs the loss scaled up: at 1e-6 curvature pairs fall below torch's threshold and every step is gradient descent.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import FitError, OptionError
from spmconvert.operator.factors import covariance_root
from spmconvert.fit.problem import Best, Problem
from spmconvert.fit.start import can_factorise, hierarchical_start_, random_start_
from spmconvert.operator.linear import SPMLinear

STEP_SIZE = 0.1
# share of the iterations that L-BFGS gets at the end
POLISH_SHARE = 0.1
# a start this close to its target is exact up to rounding
EXACT = 1e-10


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


def fit_(
    layer: SPMLinear,
    weight: Tensor,
    bias: Tensor | None,
    statistics: ActivationStatistics,
    *,
    iterations: int = 300,
    seed: int = 0,
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
        metric: weighs the outputs' errors; None counts all directions alike.

    Raises:
        FitError: when weight or statistics are not finite.
        OptionError: when the layer is not float32.
    """
    began = time.perf_counter()
    if layer.weight.dtype != torch.float32:
        raise OptionError(
            f"the layer to fit is {layer.weight.dtype}; fits are made in float32, store another dtype afterwards"
        )
    if not (weight.isfinite().all() and statistics.scatter.isfinite().all() and statistics.mean.isfinite().all()):
        raise FitError("weight or input statistics are not finite; a least-squares fit needs finite numbers")
    root = covariance_root(statistics.covariance)
    problem = Problem(layer, weight, root, metric)
    result = (1.0, 1.0, 0)
    if problem.zero > 0:
        with torch.enable_grad():
            result = _solve(problem, weight, root, iterations, seed)
    else:
        with torch.no_grad():
            layer.scale_out.zero_()
    _balance_companion_(layer)
    correct_bias_(layer, weight, bias, statistics)
    return FitResult(*result, seconds=time.perf_counter() - began)


def _solve(problem: Problem, weight: Tensor, root: Tensor, iterations: int, seed: int) -> tuple[float, float, int]:
    layer = problem.layer
    # the layer's matrix maps scaled rows to scaled targets while the solver works
    unscale = problem.target_size / problem.input_size
    _fresh_start_(problem, weight, root, unscale, seed)
    with torch.no_grad():
        start = problem.error().item()
        best = Best(problem, problem.loss().item())
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
        end = problem.error().item()
    problem.rescale_(unscale)
    if end < 1:
        problem.set_companion_(weight)
        return start, end, done
    # nothing found that beats predicting the mean output
    with torch.no_grad():
        layer.scale_out.zero_()
        if layer.low_rank_out is not None:
            layer.low_rank_out.zero_()
    return start, 1.0, done


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


def _fresh_start_(problem: Problem, weight: Tensor, root: Tensor, unscale: Tensor, seed: int) -> None:
    layer = problem.layer
    problem.basis = problem.companion_basis(weight, root)
    if problem.basis is None and can_factorise(layer.geometry):
        hierarchical_start_(layer, weight.float() / unscale)
        with torch.no_grad():
            if problem.loss().item() < EXACT:
                return
    random_start_(layer, seed)
    problem.fit_size_()


def _adam(problem: Problem, best: Best, steps: int) -> None:
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


def _polish(problem: Problem, best: Best, steps: int) -> None:
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


def fit_linear(
    dense: nn.Linear,
    statistics: ActivationStatistics | None = None,
    *,
    iterations: int = 300,
    seed: int = 0,
    **design: Any,
) -> tuple[SPMLinear, FitResult]:
    """Build and fit the replacement of one nn.Linear.

    Args:
        dense: the layer to replace.
        statistics: moments of its inputs; None fits in the Frobenius norm and leaves the bias as it is.
        iterations: most iterations of the solver.
        seed: seed of the start.
        **design: ``stages``, ``variant``, ``block``, ``rank`` of the layer.

    Returns:
        The layer, in the dtype and on the device of the dense one, and what the fit did.
    """
    weight = dense.weight.detach()
    bias: Tensor | None = dense.bias
    has_bias = bias is not None or statistics is not None
    layer = SPMLinear(dense.in_features, dense.out_features, has_bias, device=weight.device, dtype=torch.float32, **design)
    moments = statistics or ActivationStatistics.isotropic(dense.in_features)
    result = fit_(layer, weight, bias, moments.to(weight.device), iterations=iterations, seed=seed)
    return layer.to(weight.dtype), result
