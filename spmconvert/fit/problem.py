"""The least-squares problem of one layer, in the unknowns of its stages; a companion is eliminated from it.

Minimised is E‖(W - S)(x - μ)‖² = ‖R (W - S)ᵀ‖² with RᵀR = Σ, the centred second moment of the inputs, so the rows of R
are the only tokens, in_features of them however long the calibration text was. Target and rows are scaled to unit size, so
that one step size serves every layer. Where an ``OutputMetric`` says how much output directions matter, the squared error
is taken in that metric.

A companion is no unknown of the solver. Given the stages, the best one is the truncated SVD of what they leave, so the
error is what that SVD leaves, a function of the stages alone (variable projection, Golub and Pereyra 1973); its gradient
needs only the left singular vectors, which follow the stages by one step of subspace iteration each. Stepping the
companion's factors with the stages instead loses the SVD in the first steps and is slow to find it again (at half of the
parameters 1.6 times the loss of low rank alone, instead of 0.93).

What the stages put where the companion is would cost nothing then, since the companion takes it off again, and it drifts:
both parts of a layer of all-MiniLM-L6-v2 ended 53 times as large as their sum, which no half precision survives. So it is
penalised, a little: the error rises by 0.4 %, and the parts stay about as large as the whole. The tables are in
benchmarks/results/choices.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.operator.factors import factors_on, left_singular_vectors, metric_weighted
from spmconvert.operator.linear import SPMLinear

# of subspace iteration, after which the companion is the truncated SVD but for vectors of nearly equal energy
SETTLING_STEPS = 4
# weight of the squared outputs that stages have along the companion's directions
DUPLICATION_PENALTY = 1e-3
_STAGES = ("weight", "scale_in", "scale_out")


class Problem:
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
        """What the solver minimises: the error, and a penalty on what stages put where the companion is.

        Args:
            follow: let the companion follow the stages by a step of subspace iteration.
        """
        output = self._weighted(self._output())
        remainder = self._weighted(self.target) - output
        if follow and self.basis is not None:
            self.basis = _subspace_step(remainder.detach(), self.basis)
        missed = self._uncompanioned(remainder).square().sum()
        if self.basis is not None:
            missed = missed + DUPLICATION_PENALTY * (output @ self.basis).square().sum()
        return missed / self.zero

    def error(self) -> Tensor:
        """Squared error in the metric, relative to the target: the zero matrix has 1."""
        return self._uncompanioned(self._weighted(self.target - self._output())).square().sum() / self.zero

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs if self.metric is None else self.metric.root(outputs)

    def _uncompanioned(self, outputs: Tensor) -> Tensor:
        """What the companion leaves of weighted outputs."""
        return outputs if self.basis is None else outputs - (outputs @ self.basis) @ self.basis.t()

    def _output(self) -> Tensor:
        """Outputs of the stages alone."""
        with bare(self.layer):
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
        stages, wanted = (self._uncompanioned(self._weighted(outputs)) for outputs in (self._output(), self.target))
        self.layer.scale_out.mul_((stages * wanted).sum() / stages.square().sum().clamp_min(1e-30))

    def companion_basis(self, weight: Tensor, root: Tensor) -> Tensor | None:
        """Left singular vectors of a matrix [out_features, in_features], as many as the companion has ranks."""
        rank = self.layer.geometry.rank
        return left_singular_vectors(metric_weighted(weight.float(), self.metric), root, rank) if rank else None

    @torch.no_grad()
    def set_companion_(self, weight: Tensor) -> None:
        """Write what the basis takes over of the weight, the stages taken off, into the companion."""
        layer = self.layer
        if self.basis is None or layer.low_rank_in is None or layer.low_rank_out is None:
            return
        with bare(layer):
            rest = weight.float() - layer.to_dense()
        left, right = factors_on(self.basis, rest, self.metric)
        layer.low_rank_out.copy_(left)
        layer.low_rank_in.copy_(right)

    def snapshot(self) -> list[Tensor]:
        """A copy of the unknowns."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore_(self, values: list[Tensor]) -> None:
        """Put a snapshot back."""
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


@contextmanager
def bare(layer: SPMLinear) -> Iterator[None]:
    """The layer without bias and companion."""
    taken_off = layer.bias, layer.low_rank_in, layer.low_rank_out
    layer.bias = layer.low_rank_in = layer.low_rank_out = None
    try:
        yield
    finally:
        layer.bias, layer.low_rank_in, layer.low_rank_out = taken_off


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
