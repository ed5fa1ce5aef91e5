"""Fit many layers of one shape and the same free terms together, each as ``solver`` fits it alone.

Small layers leave a GPU waiting for launches, so a batch of them is meant to take about as long as one of them. That gain
has not been measured on a GPU yet; ``benchmarks/batched_fit.py --device cuda`` measures it. On a CPU there is little of it,
and layers are fitted one by one there.

Only what a gradient fits is done together: Adam and L-BFGS, with low rank following. Closed forms, starts, roots and
decompositions are made one by one before and after it, and layers that have nothing else gain nothing.

Every member goes the way that it goes alone, but for rounding: products of batches round otherwise, and L-BFGS makes the
difference grow. It depends on who is in the batch, too, so whoever forms batches (``batches``) has to form the same ones
again where the same bytes are wanted.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from spmconvert.fit.aim import Aim, Errors, FitResult, Solving, begin
from spmconvert.fit.batched_lbfgs import BatchedLBFGS
from spmconvert.fit.batched_problem import BatchedProblem, signature
from spmconvert.fit.solver import BURST, LEAST_GAIN, LOSS_SCALE, STEP_SIZE, shares, solve_

# Adam as torch has it: decays of both moments, and what is added to the root of the second
DECAYS, EPSILON = (0.9, 0.999), 1e-8


class _Best:
    """The best points that members have seen so far.

    Attributes:
        losses: [members].
        values: their unknowns, [members, unknowns].
        basis: what low rank takes over there, or None.
    """

    def __init__(self, problem: BatchedProblem, solving: Sequence[Solving]) -> None:
        self.losses = problem.start.new_tensor([one.best.loss for one in solving])
        self.values, self.basis = problem.start, problem.basis
        self.live = torch.ones(len(solving), dtype=torch.bool, device=problem.start.device)

    def offer(self, problem: BatchedProblem, losses: Tensor, values: Tensor) -> None:
        """Keep the points of live members whose losses are the least so far."""
        better = self.live & (losses < self.losses)
        self.losses = losses.where(better, self.losses)
        self.values = values.where(better[:, None], self.values)
        if self.basis is not None and problem.basis is not None:
            self.basis = problem.basis.where(better[:, None, None], self.basis)


def fit_batch_(aims: Sequence[Aim], *, iterations: int = 300) -> list[FitResult]:
    """Fit float32 layers in place, biases included; those with terms of the same ``batch_form`` are solved together.

    Args:
        aims: what is fitted; layers of one shape on one device.
        iterations: most iterations of the solver.

    Returns:
        What the fits did, in order. Each has an equal share of the time that all took.

    Raises:
        FitError: when a weight or statistics are not finite.
        OptionError: when a layer is not float32.
        BackendError: when a layer asks for a backend that cannot run a batch.
    """
    began = time.perf_counter()
    begun = [begin(aim, iterations) for aim in aims]
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, solving in enumerate(begun):
        if isinstance(solving, Solving) and any(shares(solving, iterations)):
            groups.setdefault(signature(solving.problem), []).append(place)
    done = dict.fromkeys(range(len(aims)), 0)
    for places in groups.values():
        members = [solving for place in places if isinstance(solving := begun[place], Solving)]
        with torch.enable_grad():
            found = solve_together_(members, iterations) if len(members) > 1 else [solve_(members[0], iterations)]
        done.update(zip(places, found, strict=True))
    errors = [one if isinstance(one, Errors) else one.finish(done[place]) for place, one in enumerate(begun)]
    seconds = (time.perf_counter() - began) / len(aims)
    return [aim.finish(own, seconds) for aim, own in zip(aims, errors, strict=True)]


def solve_together_(solving: Sequence[Solving], iterations: int) -> list[int]:
    """Run the solver on all members, and take their best points to them; returns everyone's iterations."""
    problem = BatchedProblem([one.problem for one in solving])
    best = _Best(problem, solving)
    steps, polish = shares(solving[0], iterations)
    if steps:
        _adam(problem, best, steps)
        problem.basis = best.basis
        problem.settle_(best.values, best.live)
    done = _polish(problem, best, polish) if polish else [0] * len(solving)
    for member, (one, loss) in enumerate(zip(solving, best.losses.tolist(), strict=True)):
        one.best.loss = loss
        one.best.values, one.best.basis = problem.point(member, best.values, best.basis)
    return [steps + own for own in done]


def _adam(problem: BatchedProblem, best: _Best, steps: int) -> None:
    """Adam with a cosine step size; torch's has one step size for a tensor, and here each member's terms have their own."""
    values = problem.start.clone().requires_grad_()
    mean, square = torch.zeros_like(problem.start), torch.zeros_like(problem.start)
    for step in range(steps):
        losses = problem.losses(values, follow=True)
        best.offer(problem, losses.detach(), values.detach())
        (gradient,) = torch.autograd.grad(losses.sum(), values)
        with torch.no_grad():
            mean.lerp_(gradient, 1 - DECAYS[0])
            square.mul_(DECAYS[1]).addcmul_(gradient, gradient, value=1 - DECAYS[1])
            unbiased_mean, unbiased_square = (1 - decay ** (step + 1) for decay in DECAYS)
            size = STEP_SIZE * (1 + math.cos(math.pi * step / steps)) / 2 / unbiased_mean
            denominator = (square.sqrt() / math.sqrt(unbiased_square)).add_(EPSILON)
            values.sub_(size * problem.step_sizes * mean / denominator)
    with torch.no_grad():
        best.offer(problem, problem.losses(values, follow=True), values.detach())


def _polish(problem: BatchedProblem, best: _Best, steps: int) -> list[int]:
    """Run L-BFGS until a member no longer gains; returns everyone's iterations."""

    def evaluate(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.detach().requires_grad_()
        losses = problem.losses(values)
        best.offer(problem, losses.detach(), values.detach())
        (gradient,) = torch.autograd.grad(losses.sum() * LOSS_SCALE, values)
        return losses.detach().double() * LOSS_SCALE, gradient

    optimizer = BatchedLBFGS(evaluate, best.values)
    done = [steps] * len(best.losses)
    for before in range(0, steps, BURST):
        losses = best.losses.tolist()
        optimizer.burst(best.live, min(BURST, steps))
        gains = [
            math.isfinite(after) and after <= (1 - LEAST_GAIN) * earlier
            for after, earlier in zip(best.losses.tolist(), losses, strict=True)
        ]
        for member, (gained, was_live) in enumerate(zip(gains, best.live.tolist(), strict=True)):
            if was_live and not gained:
                done[member] = min(before + BURST, steps)
        best.live = best.live & torch.tensor(gains, device=best.live.device)
        if not best.live.any():
            break
        problem.settle_(optimizer.values, best.live)
    return done
