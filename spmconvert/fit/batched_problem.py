"""The least-squares problems of several layers with the same free terms, as one: all tensors have a first axis of members.

What free terms make of the rows is in ``batched_terms``; everything else of ``Problem`` is written for batches here.

Low rank may have another rank in every member: bases are as wide as the widest, with columns of zeros behind the others'
own. Their columns are made orthonormal by Cholesky factors of their Gram matrices, in float64 and twice, since the QR of
torch goes through the members one by one on a GPU where they have more than 256 rows; members that are too close to
singular for that get a QR.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric, StackedRoots
from spmconvert.fit.batched_terms import StackedTerm
from spmconvert.fit.problem import DUPLICATION_PENALTY, SETTLING_STEPS, Problem

# a column whose part apart from those before it is a smaller share of it than this takes a QR
DEPENDENT = 1e-7


class BatchedProblem:
    """Problems of one signature (see ``signature``) as one.

    Args:
        problems: at their starts. They share their rows and targets with this one from now on.

    Attributes:
        start: unknowns of all members, [members, unknowns].
        step_sizes: what steps are relative to, of the same shape.
        basis: what low rank takes over, [members, out_features, rank]; None without low rank.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._roots = _stacked_roots(problems)
        self._rows = torch.stack([problem.rows for problem in problems])
        self._target = torch.stack([problem.target for problem in problems])
        for problem, rows, target in zip(problems, self._rows, self._target, strict=True):
            # one copy is enough
            problem.rows, problem.target = rows, target
        self._weighted_target = self._weighted(self._target)
        self._zero = torch.stack([problem.zero for problem in problems])
        self._terms = [StackedTerm.of(modules) for modules in zip(*(problem.free for problem in problems), strict=True)]
        self._sizes = [term.size for term in self._terms]
        self.start = torch.cat([term.start() for term in self._terms], dim=1)
        self.step_sizes = torch.cat([term.step_sizes() for term in self._terms], dim=1)
        self.basis, self._is_own = _stacked_bases(problems)

    def losses(self, values: Tensor, *, follow: bool = False) -> Tensor:
        """``Problem.loss`` of every member, [members], for unknowns [members, unknowns]."""
        output = self._output(values)
        remainder = self._weighted_target - output
        if self.basis is None:
            return remainder.square().sum((1, 2)) / self._zero
        if follow:
            self.basis = self._subspace_step(remainder.detach(), self.basis)
        left_over = remainder - (remainder @ self.basis) @ self.basis.mT
        missed = left_over.square().sum((1, 2)) + DUPLICATION_PENALTY * (output @ self.basis).square().sum((1, 2))
        return missed / self._zero

    @torch.no_grad()
    def settle_(self, values: Tensor, live: Tensor) -> None:
        """``Problem.settle_`` for the members that are live, [members] (bool)."""
        if self.basis is None:
            return
        remainder = self._weighted_target - self._output(values)
        settled = self.basis
        for _ in range(SETTLING_STEPS):
            settled = self._subspace_step(remainder, settled)
        self.basis = settled.where(live[:, None, None], self.basis)

    def point(self, member: int, values: Tensor, basis: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Unknowns and basis of all members as one member's own problem has them."""
        parts = values[member].split(self._sizes)
        own = [tensor for term, part in zip(self._terms, parts, strict=True) for tensor in term.own(member, part)]
        if basis is None:
            return own, None
        return own, basis[member, :, self._is_own[member]].contiguous()

    def _output(self, values: Tensor) -> Tensor:
        """Weighted outputs of the free terms, [members, rows, out_features]."""
        parts = values.split(self._sizes, dim=1)
        first, *others = (term.outputs(part, self._rows) for term, part in zip(self._terms, parts, strict=True))
        for output in others:
            first = first + output
        return self._weighted(first)

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs if self._roots is None else self._roots.of(outputs)

    def _subspace_step(self, rows: Tensor, basis: Tensor) -> Tensor:
        return orthonormal(rows.mT @ (rows @ basis), self._is_own)


def signature(problem: Problem) -> tuple[object, ...]:
    """What problems must have in common to be solved together."""
    metric = problem.wanted.metric
    directions = len(metric.values) if isinstance(metric, OutputMetric) else None
    terms = tuple(module.term.batch_form() for module in problem.free)
    # another norm than the one that is known how to stack
    other = id(metric) if metric is not None and directions is None else None
    return terms, problem.basis is None, directions, other, problem.rows.shape, problem.target.shape


def orthonormal(columns: Tensor, is_own: Tensor) -> Tensor:
    """Orthonormal columns with the span of others.

    Args:
        columns: [members, features, rank].
        is_own: which columns a member has, [members, rank] (bool); the others are zero, and stay so.
    """
    wide = columns.double()
    wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    vacant = torch.diag_embed((~is_own).double())
    singular = torch.zeros(len(wide), dtype=torch.bool, device=wide.device)
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(wide.mT @ wide + vacant)
        singular |= (failed != 0) | (factor.diagonal(dim1=1, dim2=2).amin(1) < DEPENDENT)
        wide = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False)
    result = wide.to(columns.dtype)
    if singular.any():
        result[singular] = torch.linalg.qr(columns[singular])[0] * is_own[singular][:, None]
    return result


def _stacked_roots(problems: Sequence[Problem]) -> StackedRoots | None:
    metrics = [problem.wanted.metric for problem in problems]
    found = [metric for metric in metrics if isinstance(metric, OutputMetric)]
    return StackedRoots(found) if found else None


def _stacked_bases(problems: Sequence[Problem]) -> tuple[Tensor | None, Tensor]:
    """Bases side by side, and which of their columns are a member's own, [members, rank]."""
    bases = [problem.basis for problem in problems if problem.basis is not None]
    if not bases:
        return None, torch.empty(0)
    widest = max(basis.shape[1] for basis in bases)
    padded = torch.stack([torch.nn.functional.pad(basis, (0, widest - basis.shape[1])) for basis in bases])
    ranks = torch.tensor([basis.shape[1] for basis in bases], device=padded.device)
    return padded, torch.arange(widest, device=padded.device) < ranks[:, None]
