"""Choose one candidate a layer so that the predicted losses add up to the least under a budget.

This is the multiple-choice knapsack problem. It is solved by dynamic programming over costs in whole steps, rounded up, so
the choice never exceeds the budget; what rounding gives away is bounded by the Lagrangian relaxation, whose value comes
with the answer: no choice has a smaller loss. Costs are integers; a loss that is not finite belongs to no candidate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spmconvert.errors import OptionError

# steps that a budget is counted in; a layer's cost is rounded up by less than one of them
STEPS = 1 << 15
_HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """A choice of one candidate a layer.

    Attributes:
        chosen: index of every layer's candidate.
        cost: their costs together.
        loss: their losses together.
        bound: no choice within the budget has a smaller loss than this.
        limit: the budget; None where each layer had a limit of its own.
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    limit: int | None = None


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, unit: str) -> Choice:
    """The choice of least loss.

    Args:
        costs: cost of every candidate, by layer.
        losses: predicted loss of every candidate, by layer.
        budget: most that the chosen costs may add up to.
        unit: what costs are counted in, for the error.

    Raises:
        OptionError: when even the cheapest candidates exceed the budget, or a layer has none with a finite loss.
    """
    usable = [[index for index, loss in enumerate(layer) if math.isfinite(loss)] for layer in losses]
    if not all(usable):
        raise OptionError(
            f"layer {usable.index([]) + 1} of {len(usable)} has no candidate with a finite loss; leave it out"
        )
    costs = [[layer[index] for index in indices] for layer, indices in zip(costs, usable, strict=True)]
    losses = [[layer[index] for index in indices] for layer, indices in zip(losses, usable, strict=True)]
    picks = _pick(costs, losses, budget - check_budget(costs, budget, unit))
    cost = sum(layer[index] for layer, index in zip(costs, picks, strict=True))
    loss = sum(layer[index] for layer, index in zip(losses, picks, strict=True))
    chosen = tuple(indices[index] for indices, index in zip(usable, picks, strict=True))
    return Choice(chosen, cost, loss, min(loss, lower_bound(costs, losses, budget)), budget)


def _pick(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], spare: int) -> list[int]:
    """Candidates of least loss, whose costs exceed those of the cheapest ones by at most ``spare``."""
    # costs of layers have large divisors in common, and in multiples of those nothing is rounded; where the cheapest ones
    # nearly fill the budget, steps of what is left are finer than steps of all
    common = math.gcd(*(cost - min(layer) for layer in costs for cost in layer)) or 1
    step = max(common, -(-spare // STEPS))
    best = torch.zeros(spare // step + 1, dtype=torch.float64)
    picked: list[tuple[torch.Tensor, list[int]]] = []
    for layer_costs, layer_losses in zip(costs, losses, strict=True):
        steps = [-(-(cost - min(layer_costs)) // step) for cost in layer_costs]
        options = torch.full((len(steps), len(best)), float("inf"), dtype=torch.float64)
        for row, (need, loss) in enumerate(zip(steps, layer_losses, strict=True)):
            if need < len(best):
                options[row, need:] = best[: len(best) - need] + loss
        best, pick = options.min(0)
        picked.append((pick, steps))
    left = len(best) - 1
    chosen = []
    for pick, steps in reversed(picked):
        chosen.append(int(pick[left]))
        left -= steps[chosen[-1]]
    return chosen[::-1]


def check_budget(costs: Sequence[Sequence[int]], budget: int, unit: str) -> int:
    """The cost of the cheapest candidates of all layers together.

    Raises:
        OptionError: when they exceed the budget.
    """
    least = sum(min(layer) for layer in costs)
    if least > budget:
        raise OptionError(
            f"the budget is {budget:,} {unit}, the smallest candidates of all layers need {least:,}; allow more"
        )
    return least


def lower_bound(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> float:
    """The largest value of the Lagrangian dual: min over candidates of loss + price · cost, minus price · budget."""

    def at(price: float) -> tuple[float, int]:
        value, used = -price * budget, 0
        for layer_costs, layer_losses in zip(costs, losses, strict=True):
            total, cost = min((loss + price * cost, cost) for cost, loss in zip(layer_costs, layer_losses, strict=True))
            value, used = value + total, used + cost
        return value, used

    low, high = 0.0, 1.0
    while at(high)[1] > budget and high < 1e300:
        high *= 2
    best = max(at(low)[0], at(high)[0])
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        value, used = at(price)
        best = max(best, value)
        low, high = (price, high) if used > budget else (low, price)
    return best
