"""One fit before and after a solver: closed forms, the start of all other terms, and what is kept of what was found.

Terms with a closed form are solved one after the other, each on what the rest leaves, for a few rounds. Where others stand
beside them, these are fitted to what the closed forms leave, by ``solver`` or, many layers together, by ``batched_solver``.
The best point that was seen is kept, starting with the start itself, so a fit is never worse than the zero matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import FitError, OptionError
from spmconvert.fit.problem import Best, Problem
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.module import LeastSquares, TermModule

# iterations that a round of closed forms, each solved on what the others leave, stands for
ROUND = 32
# less gain than this share ends rounds
LEAST_GAIN = 1e-3


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


class Errors(NamedTuple):
    """Relative centred errors on the fitted rows, in the metric of the fit.

    Attributes:
        start: of the start.
        end: of the terms that were kept.
        iterations: iterations in between.
    """

    start: float
    end: float
    iterations: int


@dataclass(frozen=True)
class Aim:
    """What one layer is fitted to; attributes as the arguments of ``fit_``."""

    layer: SPMLinear
    weight: Tensor
    bias: Tensor | None
    statistics: ActivationStatistics
    seed: int = 0
    metric: OutputMetric | None = None
    root: Tensor | None = None

    def wanted(self) -> LeastSquares:
        """The least-squares problem; errors as ``begin`` says."""
        if self.layer.weight.dtype != torch.float32:
            raise OptionError(
                f"the layer to fit is {self.layer.weight.dtype}; fits are made in float32, store another dtype afterwards"
            )
        moments = self.statistics
        if not (self.weight.isfinite().all() and moments.scatter.isfinite().all() and moments.mean.isfinite().all()):
            raise FitError("weight or input statistics are not finite; a least-squares fit needs finite numbers")
        root = covariance_root(moments.covariance) if self.root is None else self.root
        return LeastSquares(self.weight.float(), root, self.metric)

    def finish(self, errors: Errors, seconds: float) -> FitResult:
        """Correct the bias of the layer, whose terms are fitted."""
        self.layer.drop_cache_()
        correct_bias_(self.layer, self.weight, self.bias, self.statistics)
        return FitResult(*errors, seconds=seconds)


@dataclass
class Solving:
    """A fit that a solver works on.

    Attributes:
        problem: what it minimises.
        best: the best point so far.
        start: error of the start, relative to what closed forms have left.
        left: what they have left of the weight.
    """

    problem: Problem
    best: Best
    start: float
    left: float

    def finish(self, iterations: int) -> Errors:
        """Take the layer to the best point; ``iterations`` were run."""
        problem = self.problem
        self.best.restore_()
        with torch.no_grad():
            end = problem.error().item()
        problem.rescale_()
        if end < 1:
            problem.set_low_rank_()
        else:
            # nothing found that beats predicting the mean output
            problem.zero_()
            end = 1.0
        # of the whole weight, not of what closed forms have left
        return Errors(self.left * self.start, self.left * end, iterations)


def begin(aim: Aim, iterations: int) -> "Solving | Errors":
    """Solve closed forms and take all other terms to their start; gives the errors where nothing is left for a solver.

    Raises:
        FitError: when weight or statistics are not finite.
        OptionError: when the layer is not float32.
    """
    layer, wanted = aim.layer, aim.wanted()
    if not (wanted.weight @ wanted.root.t()).any():
        with torch.no_grad():
            for module in layer.term_modules:
                module.scale_parameter().zero_()
        return Errors(1.0, 1.0, 0)
    free = [module for module in layer.term_modules if not module.term.closed_form]
    if not free:
        return Errors(*_solve_in_turn(layer.term_modules, wanted, iterations), 0)
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
        problem.start_(aim.seed)
    with torch.no_grad():
        start = problem.error().item()
        best = Best(problem, problem.loss().item())
    return Solving(problem, best, start, left)


@torch.no_grad()
def _solve_in_turn(modules: Sequence[TermModule], wanted: LeastSquares, iterations: int) -> tuple[float, float]:
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
    return errors[0], errors[-1]


def _relative_error(wanted: LeastSquares, matrix: Tensor) -> float:
    """Squared error in the metric, relative to the target."""
    left, target = ((difference @ wanted.root.t()).t() for difference in (wanted.weight - matrix, wanted.weight))
    if wanted.metric is not None:
        left, target = wanted.metric.root(left), wanted.metric.root(target)
    return (left.square().sum() / target.square().sum()).item()


@torch.no_grad()
def correct_bias_(layer: SPMLinear, weight: Tensor, bias: Tensor | None, statistics: ActivationStatistics) -> None:
    """Set the bias to b + (W - S) μ, in place, so that the mean output is exact."""
    held = layer.held_bias
    if held is None:
        return
    difference = weight.double() - layer.to_dense().double()
    corrected = difference @ statistics.mean.double()
    held.copy_(corrected if bias is None else corrected + bias.double())
