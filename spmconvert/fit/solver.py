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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import FitError, OptionError
from spmconvert.fit.problem import Best, Problem
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.module import LeastSquares, TermModule

STEP_SIZE = 0.1
# share of the iterations that L-BFGS gets at the end
POLISH_SHARE = 0.1
# a start this close to its target is exact up to rounding
EXACT = 1e-10
# iterations that a round of closed forms, each solved on what the others leave, stands for, and one of L-BFGS from a start
# that is near
ROUND, NEAR = 32, 4
# less gain than this share ends rounds and L-BFGS
LEAST_GAIN = 1e-3
# iterations of L-BFGS after which its gain is looked at
BURST = 10


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
    began = time.perf_counter()
    if layer.weight.dtype != torch.float32:
        raise OptionError(
            f"the layer to fit is {layer.weight.dtype}; fits are made in float32, store another dtype afterwards"
        )
    if not (weight.isfinite().all() and statistics.scatter.isfinite().all() and statistics.mean.isfinite().all()):
        raise FitError("weight or input statistics are not finite; a least-squares fit needs finite numbers")
    root = covariance_root(statistics.covariance) if root is None else root
    wanted = LeastSquares(weight.float(), root, metric)
    result = _fit_terms(layer, wanted, iterations, seed)
    layer.drop_cache_()
    correct_bias_(layer, weight, bias, statistics)
    return FitResult(*result, seconds=time.perf_counter() - began)


def _fit_terms(layer: SPMLinear, wanted: LeastSquares, iterations: int, seed: int) -> tuple[float, float, int]:
    """Fit all terms; returns the error at the start, at the end, and the iterations."""
    if not (wanted.weight @ wanted.root.t()).any():
        with torch.no_grad():
            for module in layer.term_modules:
                module.scale_parameter().zero_()
        return 1.0, 1.0, 0
    free = [module for module in layer.term_modules if not module.term.closed_form]
    if not free:
        return _solve_in_turn(layer.term_modules, wanted, iterations)
    beside = [module for module in layer.term_modules if module.term.closed_form and module is not layer.low_rank]
    left = 1.0
    if beside:
        with torch.no_grad():
            for module in (*free, *([] if layer.low_rank is None else [layer.low_rank])):
                module.scale_parameter().zero_()
        left = _solve_in_turn(beside, wanted, iterations)[1]
        with torch.no_grad():
            wanted = wanted.leaving(wanted.weight - sum(module.matrix() for module in beside))
    problem = Problem(free, layer.low_rank, wanted)
    with torch.enable_grad():
        start, end, done = _solve(problem, iterations, seed)
    # of the whole weight, not of what closed forms have left
    return left * start, left * end, done


@torch.no_grad()
def _solve_in_turn(modules: Sequence[TermModule], wanted: LeastSquares, iterations: int) -> tuple[float, float, int]:
    """Solve every closed form on what the others leave, and keep the best round."""
    matrices = [torch.zeros_like(wanted.weight) for _ in modules]
    errors: list[float] = []
    for _ in range(max(1, iterations // ROUND) if len(modules) > 1 else 1):
        before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
        for index, module in enumerate(modules):
            others = sum(matrix for other, matrix in enumerate(matrices) if other != index)
            module.solve_(wanted.leaving(wanted.weight - others))
            matrices[index] = module.matrix()
        errors.append(_relative_error(wanted, sum(matrices)))  # type: ignore[arg-type]
        if len(errors) > 1 and errors[-1] > errors[-2]:
            for module, values in zip(modules, before, strict=True):
                module.load_state_dict(values)
            errors.pop()
            break
        if len(errors) > 1 and errors[-1] > (1 - LEAST_GAIN) * errors[-2]:
            break
    return errors[0], errors[-1], 0


def _relative_error(wanted: LeastSquares, matrix: Tensor) -> float:
    """Squared error in the metric, relative to the target."""
    left, target = ((difference @ wanted.root.t()).t() for difference in (wanted.weight - matrix, wanted.weight))
    if wanted.metric is not None:
        left, target = wanted.metric.root(left), wanted.metric.root(target)
    return (left.square().sum() / target.square().sum()).item()


def _solve(problem: Problem, iterations: int, seed: int) -> tuple[float, float, int]:
    problem.start_(seed)
    with torch.no_grad():
        start = problem.error().item()
        best = Best(problem, problem.loss().item())
    done = 0
    if start > EXACT and iterations:
        near = all(module.starts_near for module in problem.free)
        polish = max(1, iterations // NEAR if near else round(POLISH_SHARE * iterations))
        steps = 0 if near else iterations - polish
        if steps:
            _adam(problem, best, steps)
            best.restore_()
        done = steps + _polish(problem, best, polish)
    best.restore_()
    with torch.no_grad():
        end = problem.error().item()
    problem.rescale_()
    if end < 1:
        problem.set_low_rank_()
        return start, end, done
    # nothing found that beats predicting the mean output
    problem.zero_()
    return start, 1.0, done


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
        (loss * 1e6).backward()
        return loss.item() * 1e6

    for done in range(0, steps, BURST):
        before = best.loss
        optimizer.step(closure)
        if not math.isfinite(best.loss) or best.loss > (1 - LEAST_GAIN) * before:
            return min(done + BURST, steps)
        if problem.basis is not None:
            problem.settle_()
    return steps


@torch.no_grad()
def correct_bias_(layer: SPMLinear, weight: Tensor, bias: Tensor | None, statistics: ActivationStatistics) -> None:
    """Set the bias to b + (W - S) μ, in place, so that the mean output is exact."""
    held = layer.held_bias
    if held is None:
        return
    difference = weight.double() - layer.to_dense().double()
    corrected = difference @ statistics.mean.double()
    held.copy_(corrected if bias is None else corrected + bias.double())


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
