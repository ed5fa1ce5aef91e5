"""Fit a layer's terms to a dense one: weighted least squares in the norm of the inputs, with exact bias correction.

The mean goes into the bias exactly, b' = b + (W - S) μ; where there is none the fit is to the uncentred second moment,
which the mean is part of. Terms with a closed form are solved one after the other, each on what the rest leaves, for a few
rounds; those without are fitted by a gradient, with low rank eliminated (``problem``).

The gradient's solver is Adam with a cosine step size, then L-BFGS; the best point seen is kept, starting with the start
itself, so a fit is never worse than the zero matrix. Adam comes first because it gets farther in the same time: 0.567 of
the centred outputs' energy is left after 3.7 s where L-BFGS alone leaves 0.596 after 8.1 s (other step sizes, starts and
closed-form sweeps: docs/results.md). Terms that start near the end go to L-BFGS at once, which stops when it
no longer gains.

L-BFGS needs the loss scaled up: at 1e-6 curvature pairs fall below torch's threshold and every step is gradient descent.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.aim import Aim, FitResult, Solving, begin
from spmconvert.fit.problem import Best, Problem
from spmconvert.operator.linear import SPMLinear

STEP_SIZE = 0.1
# share of the iterations that L-BFGS gets at the end
POLISH_SHARE = 0.1
# a start this close to its target is exact up to rounding
EXACT = 1e-10
# iterations that one of L-BFGS from a start that is near stands for
NEAR = 4
# less gain than this share ends L-BFGS
LEAST_GAIN = 1e-3
# iterations of L-BFGS after which its gain is looked at
BURST = 10
# what its loss is multiplied by
LOSS_SCALE = 1e6


def fit_(
    layer: SPMLinear,
    weight: Tensor,
    bias: Tensor | None,
    statistics: ActivationStatistics,
    *,
    iterations: int = 300,
    seed: int = 0,
    metric: OutputMetric | None = None,
    root: Tensor | None = None,
) -> FitResult:
    """Fit a float32 layer in place, bias included.

    Args:
        layer: the layer to fill; with a bias unless the statistics have zero mean and ``bias`` is None.
        weight: dense weight [out_features, in_features].
        bias: dense bias [out_features], or None.
        statistics: moments of the layer's inputs.
        iterations: most iterations of the solver; 0 keeps the start. Closed forms take none.
        seed: seed of the start.
        metric: weighs the outputs' errors; None counts all directions alike.
        root: ``covariance_root`` of the statistics, where it is known already.

    Raises:
        FitError: when weight or statistics are not finite.
        OptionError: when the layer is not float32.
    """
    return fit_aim_(Aim(layer, weight, bias, statistics, seed, metric, root), iterations=iterations)


def fit_aim_(aim: Aim, *, iterations: int) -> FitResult:
    """``fit_`` with its arguments in one piece."""
    began = time.perf_counter()
    solving = begin(aim, iterations)
    if isinstance(solving, Solving):
        with torch.enable_grad():
            done = solve_(solving, iterations)
        solving = solving.finish(done)
    return aim.finish(solving, time.perf_counter() - began)


def shares(solving: Solving, iterations: int) -> tuple[int, int]:
    """Iterations of Adam and most iterations of L-BFGS; none of either where the start is exact."""
    if solving.start <= EXACT or not iterations:
        return 0, 0
    near = all(module.starts_near for module in solving.problem.free)
    polish = max(1, iterations // NEAR if near else round(POLISH_SHARE * iterations))
    return (0 if near else iterations - polish), polish


def solve_(solving: Solving, iterations: int) -> int:
    """Run the solver; returns its iterations."""
    problem, best = solving.problem, solving.best
    steps, polish = shares(solving, iterations)
    if steps:
        _adam(problem, best, steps)
        best.restore_()
    return steps + (_polish(problem, best, polish) if polish else 0)


def _adam(problem: Problem, best: Best, steps: int) -> None:
    groups = [
        {"params": [parameter], "lr": STEP_SIZE * size} for module in problem.free for parameter, size in module.unknowns()
    ]
    optimizer = torch.optim.Adam(groups)
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


def _polish(problem: Problem, best: Best, steps: int) -> int:
    """Run L-BFGS until it no longer gains; returns its iterations."""
    optimizer = torch.optim.LBFGS(
        problem.parameters,
        max_iter=min(BURST, steps),
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = problem.loss()
        best.offer(loss.item())
        (loss * LOSS_SCALE).backward()
        return loss.item() * LOSS_SCALE

    for done in range(0, steps, BURST):
        before = best.loss
        optimizer.step(closure)
        if not math.isfinite(best.loss) or best.loss > (1 - LEAST_GAIN) * before:
            return min(done + BURST, steps)
        if problem.basis is not None:
            problem.settle_()
    return steps


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
        **design: ``terms``, or ``stages``, ``variant``, ``block`` and ``rank`` of the layer.

    Returns:
        The layer, in the dtype and on the device of the dense one, with a bias where that has one, and what the fit did.
    """
    weight = dense.weight.detach()
    bias: Tensor | None = dense.bias
    layer = SPMLinear(
        dense.in_features, dense.out_features, bias is not None, device=weight.device, dtype=torch.float32, **design
    )
    moments = statistics or ActivationStatistics.isotropic(dense.in_features)
    moments = moments if bias is not None else moments.uncentred()
    result = fit_(layer, weight, bias, moments.to(weight.device), iterations=iterations, seed=seed)
    return layer.to(weight.dtype), result
