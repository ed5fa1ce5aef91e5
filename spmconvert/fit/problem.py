"""The least-squares problem of one layer, in the unknowns of terms that a gradient fits; low rank is eliminated from it.

Minimised is E‖(W - S)(x - μ)‖² = ‖R (W - S)ᵀ‖² with RᵀR = Σ, the centred second moment of the inputs, so the rows of R
are the only tokens, in_features of them however long the calibration text was. Target and rows are scaled to unit size, so
that one step size serves every layer. Where an ``OutputMetric`` says how much output directions matter, the squared error
is taken in that metric.

Low rank beside other terms is no unknown of the solver. Given the others, the best one is the truncated SVD of what they
leave, so the error is what that SVD leaves, a function of the others alone (variable projection, Golub and Pereyra 1973);
its gradient needs only the left singular vectors, which follow by one step of subspace iteration each. Stepping the
factors along instead loses the SVD in the first steps and is slow to find it again (at half of the parameters 1.6 times
the loss of low rank alone, instead of 0.93).

What the other terms put where low rank is would cost nothing then, since low rank takes it off again, and it drifts: both
parts of a layer of all-MiniLM-L6-v2 ended 53 times as large as their sum, which no half precision survives. So it is
penalised, a little: the error rises by 0.4 %, and the parts stay about as large as the whole. The tables are in
docs/results.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spmconvert.operator.factors import factors_on, left_singular_vectors, metric_weighted
from spmconvert.operator.terms.lowrank import LowRankModule
from spmconvert.operator.terms.module import LeastSquares, TermModule

# of subspace iteration, after which low rank is the truncated SVD but for vectors of nearly equal energy
SETTLING_STEPS = 4
# weight of the squared outputs that other terms have along low rank's directions
DUPLICATION_PENALTY = 1e-3


class Problem:
    """The scaled least-squares problem of one layer.

    Args:
        free: the terms that a gradient fits; their parameters are the unknowns.
        low_rank: the term that is eliminated, or None.
        wanted: what they should add up to.

    Attributes:
        unscale: what the matrix of the free terms has to be multiplied by when the solver is through.
    """

    def __init__(self, free: Sequence[TermModule], low_rank: LowRankModule | None, wanted: LeastSquares) -> None:
        target = wanted.root @ wanted.weight.t()
        self.free, self.low_rank, self.wanted = free, low_rank, wanted
        input_size = wanted.root.square().mean().sqrt().clamp_min(1e-30)
        target_size = target.square().mean().sqrt()
        self.rows = wanted.root / input_size
        self.target = target / target_size
        self.unscale = target_size / input_size
        # left singular vectors of what low rank takes over, in the metric: [out_features, rank]
        self.basis: Tensor | None = None
        self.zero = self._weighted(self.target).square().sum()
        self.parameters = [parameter for module in free for parameter, _ in module.unknowns()]

    def loss(self, *, follow: bool = False) -> Tensor:
        """What the solver minimises: the error, and a penalty on what free terms put where low rank is.

        Args:
            follow: let low rank follow by a step of subspace iteration.
        """
        output = self._weighted(self._output())
        remainder = self._weighted(self.target) - output
        if follow and self.basis is not None:
            self.basis = _subspace_step(remainder.detach(), self.basis)
        missed = self._left_over(remainder).square().sum()
        if self.basis is not None:
            missed = missed + DUPLICATION_PENALTY * (output @ self.basis).square().sum()
        return missed / self.zero

    def error(self) -> Tensor:
        """Squared error in the metric, relative to the target: the zero matrix has 1."""
        return self._left_over(self._weighted(self.target - self._output())).square().sum() / self.zero

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs if self.wanted.metric is None else self.wanted.metric.root(outputs)

    def _left_over(self, outputs: Tensor) -> Tensor:
        """What low rank leaves of weighted outputs."""
        return outputs if self.basis is None else outputs - (outputs @ self.basis) @ self.basis.t()

    def _output(self) -> Tensor:
        """Outputs of the free terms."""
        first, *others = (module(self.rows) for module in self.free)
        for output in others:
            first = first + output
        return first

    def start_(self, seed: int) -> None:
        """Take every free term to its start, on what low rank would leave of the weight, which it would then take over."""
        weight = self.wanted.weight / self.unscale
        rest = weight
        if self.low_rank is not None:
            weighted = metric_weighted(weight, self.wanted.metric)
            self.basis = left_singular_vectors(weighted, self.rows, self.low_rank.term.rank)
            left, right = factors_on(self.basis, weight, self.wanted.metric)
            rest = weight - left @ right
        aim = LeastSquares(rest, self.rows, self.wanted.metric)
        for index, module in enumerate(self.free):
            module.start_(aim, seed + index)
        if self.free and not all(module.starts_near for module in self.free):
            self.fit_size_()
        self.settle_()

    @torch.no_grad()
    def settle_(self) -> None:
        """Take low rank to where the free terms as they are want it."""
        if self.basis is not None:
            remainder = self._weighted(self.target - self._output())
            for _ in range(SETTLING_STEPS):
                self.basis = _subspace_step(remainder, self.basis)

    @torch.no_grad()
    def rescale_(self) -> None:
        """Take the free terms from the scaled problem to the one that was asked for."""
        for module in self.free:
            module.scale_parameter().mul_(self.unscale)

    @torch.no_grad()
    def fit_size_(self) -> None:
        """Give the free terms the size that fits best what low rank leaves."""
        output, wanted = (self._left_over(self._weighted(part)) for part in (self._output(), self.target))
        factor = (output * wanted).sum() / output.square().sum().clamp_min(1e-30)
        for module in self.free:
            module.scale_parameter().mul_(factor)

    @torch.no_grad()
    def set_low_rank_(self) -> None:
        """Write what the basis takes over of the weight, the free terms taken off, into low rank."""
        if self.basis is None or self.low_rank is None:
            return
        rest = self.wanted.weight - sum(module.matrix() for module in self.free)
        self.low_rank.set_factors_(*factors_on(self.basis, rest, self.wanted.metric))

    @torch.no_grad()
    def zero_(self) -> None:
        """Make the matrix zero."""
        for module in (*self.free, *([self.low_rank] if self.low_rank is not None else [])):
            module.scale_parameter().zero_()

    def snapshot(self) -> list[Tensor]:
        """A copy of the unknowns."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore_(self, values: list[Tensor]) -> None:
        """Put a snapshot back."""
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


def _subspace_step(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns [features, rank] that hold more of the energy of rows [rows, features]; never less."""
    columns: Tensor = torch.linalg.qr(rows.t() @ (rows @ basis))[0]
    return columns


class Best:
    """The best point seen so far."""

    def __init__(self, problem: Problem, loss: float) -> None:
        self.problem, self.loss, self.values, self.basis = problem, loss, problem.snapshot(), problem.basis

    def offer(self, loss: float) -> None:
        """Keep the problem's point where its loss is the least so far."""
        if loss < self.loss:
            self.loss, self.values, self.basis = loss, self.problem.snapshot(), self.problem.basis

    def restore_(self) -> None:
        """Take the problem back to it."""
        self.problem.restore_(self.values)
        self.problem.basis = self.basis
        self.problem.settle_()
