"""L-BFGS for many problems of one size at once, each taking the steps that ``torch.optim.LBFGS`` takes for it alone.

Products and losses are made for all members together; only the line search (``line_search``) is each one's own, in plain
numbers that come back once an evaluation. Members wait for one another at the end of every line search, and those that are
through stay where they are, evaluated with the others: on a device that waits for launches that costs next to nothing.

What it gives up: on a device that is busy, a member with long line searches, or one that runs on when most have ended,
costs the time of all.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spmconvert.fit.line_search import Point, Trials, strong_wolfe

# changes that the curvature is taken from, and the least product of a change and what the gradient does along it
MEMORY, LEAST_CURVATURE = 10, 1e-10
# evaluations that end a burst, for each of its iterations
MOST_EVALUATIONS = 1.25

# from points [members, unknowns] to losses [members], float64, and gradients like the points
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class BatchedLBFGS:
    """The state of all members between bursts.

    Args:
        evaluate: gives losses and gradients.
        values: where they start, [members, unknowns].

    Attributes:
        values: where they are.
    """

    def __init__(self, evaluate: Evaluate, values: Tensor) -> None:
        self.values = values
        self._evaluate = evaluate
        members, unknowns = values.shape
        # oldest first; a pair that is not there has a weight of zero and changes nothing
        self._moves, self._turns = (values.new_zeros(members, MEMORY, unknowns) for _ in range(2))
        self._weights = values.new_zeros(members, MEMORY)
        self._scale = values.new_ones(members)
        self._filled = 0
        self._before: Tensor | None = None
        self._moved = torch.zeros_like(values)

    def burst(self, live: Tensor, iterations: int) -> None:
        """Move the members that are ``live`` [members] (bool) by so many iterations, or fewer where they are at the end.

        As torch does it, the first evaluation is anew: the losses may be others than at the end of the last burst.
        """
        losses, gradient = self._evaluate(self.values)
        evaluations = torch.ones(len(live), device=live.device)
        running = live & (gradient.abs().amax(1) > 0)
        for _ in range(iterations):
            if not running.any():
                return
            is_first = self._before is None
            self._remember(gradient, running)
            direction = self._direction(gradient)
            slopes = (gradient * direction).sum(1)
            running = running & ~(slopes > 0)
            direction = direction.where(running[:, None], 0.0)
            steps = (1 / gradient.abs().sum(1)).clamp_max(1.0) if is_first else torch.ones_like(slopes)
            losses, gradient, moved, spent = self._search(direction, losses, slopes, steps, running)
            self._moved = moved.where(running[:, None], self._moved)
            evaluations += torch.tensor(spent, device=live.device)
            running = running & (evaluations < int(MOST_EVALUATIONS * iterations))
            running = running & (gradient.abs().amax(1) > 0) & (moved.abs().amax(1) > 0)

    def _remember(self, gradient: Tensor, running: Tensor) -> None:
        """Take what the last move did to the gradient into the memory of those that go on."""
        if self._before is None:
            self._before = gradient
            return
        move, turn = self._moved, gradient - self._before
        product = (turn * move).sum(1)
        taken = running & (product > LEAST_CURVATURE)
        self._moves, self._turns, self._weights = (
            torch.cat([kept[:, 1:], new[:, None]], dim=1).where(taken.view(-1, *[1] * (kept.dim() - 1)), kept)
            for kept, new in ((self._moves, move), (self._turns, turn), (self._weights, 1 / product))
        )
        self._scale = (product / turn.square().sum(1)).where(taken, self._scale)
        self._before = gradient.where(running[:, None], self._before)
        self._filled = min(self._filled + 1, MEMORY)

    def _direction(self, gradient: Tensor) -> Tensor:
        """Minus the inverse curvature times the gradient (the two-loop recursion of Nocedal, 1980)."""
        direction = -gradient
        shares: list[Tensor] = []
        kept = range(MEMORY - self._filled, MEMORY)
        for index in reversed(kept):
            share = self._weights[:, index] * (self._moves[:, index] * direction).sum(1)
            direction = direction - share[:, None] * self._turns[:, index]
            shares.append(share)
        direction = direction * self._scale[:, None]
        for index, share in zip(kept, reversed(shares), strict=True):
            back = self._weights[:, index] * (self._turns[:, index] * direction).sum(1)
            direction = direction + (share - back)[:, None] * self._moves[:, index]
        return direction

    def _search(
        self, direction: Tensor, losses: Tensor, slopes: Tensor, steps: Tensor, running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
        """Go along the direction; returns losses, gradients, moves, and every member's number of evaluations."""
        known = torch.stack([losses, *(row.double() for row in (slopes, direction.abs().amax(1), steps))]).t().tolist()
        searches: dict[int, Trials] = {}
        trial, spent = [0.0] * len(known), [0] * len(known)
        for member, runs in enumerate(running.tolist()):
            if runs:
                loss, slope, reach, step = known[member]
                searches[member] = strong_wolfe(Point(0.0, loss, slope), step, reach)
                trial[member] = next(searches[member])
        start = self.values
        gradient, moved = torch.zeros_like(start), torch.zeros_like(start)
        while searches:
            moved = torch.tensor(trial, dtype=start.dtype, device=start.device)[:, None] * direction
            self.values = start + moved
            losses, gradient = self._evaluate(self.values)
            seen = torch.stack([losses, (gradient * direction).sum(1).double()]).t().tolist()
            for member, search in list(searches.items()):
                loss, slope = seen[member]
                try:
                    trial[member] = search.send((loss, slope))
                except StopIteration as ended:
                    spent[member] = ended.value
                    del searches[member]
        return losses, gradient, moved, spent
