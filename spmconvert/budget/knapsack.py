"""Choose one candidate a layer so that the predicted losses add up to the least under a budget.

This is the multiple-choice knapsack problem. It is solved by dynamic programming over costs in whole steps, rounded up, so
the choice never exceeds the budget; what rounding gives away is bounded by the Lagrangian relaxation, whose value comes
with the answer: no choice has a smaller loss. Costs are integers; a loss that is not finite belongs to no candidate.

A second limit, on costs of another unit, is kept by a price on them, about the smallest that does. What that gives up is
what a choice leaves of the second limit because no price spends it to the last.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from spmconvert.errors import OptionError

T = TypeVar("T", int, float)

# steps that a budget is counted in; a layer's cost is rounded up by less than one of them
STEPS = 1 << 15
_HALVINGS = 60
# a price above which nothing changes
_MOST = 1e200
# what a price is raised by where the candidates that it leads to exceed what it was found for, and how often
_RAISE, _RAISES = 1.03, 40


@dataclass(frozen=True)
class Choice:
    """A choice of one candidate a layer.

    Attributes:
        chosen: index of every layer's candidate.
        cost: their costs together.
        loss: their losses together.
        bound: no choice within the budget has a smaller loss than this.
        limit: the budget; None where each layer had a limit of its own.
        beside: costs and budget of a second limit; None where there is none.
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    limit: int | None = None
    beside: tuple[int, int] | None = None


@dataclass(frozen=True)
class Cost:
    """What candidates cost, and how much of it is allowed.

    Attributes:
        costs: of every candidate, by layer.
        budget: most that the chosen ones may add up to.
        unit: what they are counted in, for errors.
    """

    costs: Sequence[Sequence[int]]
    budget: int
    unit: str

    @property
    def least(self) -> int:
        """What the cheapest candidates of all layers cost together."""
        return sum(map(min, self.costs))

    def of(self, chosen: Sequence[int]) -> int:
        """What a choice costs."""
        return _sum_of(self.costs, chosen)

    def keeps(self, chosen: Sequence[int]) -> bool:
        """Whether a choice is within the budget."""
        return self.of(chosen) <= self.budget

    def only(self, usable: Sequence[Sequence[int]]) -> "Cost":
        """Of some candidates of every layer."""
        return replace(self, costs=_only(self.costs, usable))


def choose(cost: Cost, losses: Sequence[Sequence[float]], beside: Cost | None = None) -> Choice:
    """The choice of least loss.

    Args:
        cost: what candidates cost.
        losses: predicted loss of every candidate, by layer.
        beside: what they cost in another unit, where that is limited, too.

    Raises:
        OptionError: when even the cheapest candidates exceed a budget, no choice keeps both, or a layer has no candidate
            with a finite loss.
    """
    usable = [[index for index, loss in enumerate(layer) if math.isfinite(loss)] for layer in losses]
    if not all(usable):
        raise OptionError(
            f"layer {usable.index([]) + 1} of {len(usable)} has no candidate with a finite loss; leave it out"
        )
    losses, cost = _only(losses, usable), cost.only(usable)
    check_budget(cost)
    if beside is None:
        picks = _pick(cost, losses)
        bound, second = lower_bound(cost.costs, losses, cost.budget), None
    else:
        beside = beside.only(usable)
        check_budget(beside)
        picks, price = _pick_within_both(cost, losses, beside)
        bound = lower_bound(cost.costs, _priced(losses, price, beside), cost.budget) - price * beside.budget
        second = (beside.of(picks), beside.budget)
    chosen = tuple(indices[index] for indices, index in zip(usable, picks, strict=True))
    loss = _sum_of(losses, picks)
    return Choice(chosen, cost.of(picks), loss, min(loss, bound), cost.budget, second)


def _only(values: Sequence[Sequence[T]], usable: Sequence[Sequence[int]]) -> list[list[T]]:
    return [[layer[index] for index in indices] for layer, indices in zip(values, usable, strict=True)]


def _sum_of(values: Sequence[Sequence[T]], picks: Sequence[int]) -> T:
    return sum(layer[index] for layer, index in zip(values, picks, strict=True))


def _priced(losses: Sequence[Sequence[float]], price: float, cost: Cost) -> list[list[float]]:
    """Losses with a price on what candidates cost."""
    return [
        [loss + price * own for loss, own in zip(layer, layer_costs, strict=True)]
        for layer, layer_costs in zip(losses, cost.costs, strict=True)
    ]


def _pick_within_both(cost: Cost, losses: Sequence[Sequence[float]], beside: Cost) -> tuple[list[int], float]:
    """Candidates of least loss within two budgets, and the price on the second one that they were found by."""
    picks = _pick(cost, losses)
    if beside.keeps(picks):
        return picks, 0.0
    smallest = _pick(cost, beside.costs)
    if not beside.keeps(smallest):
        raise OptionError(
            f"{cost.budget:,} {cost.unit} and {beside.budget:,} {beside.unit} are not to be had at once: within the first, "
            f"the smallest candidates of all layers need {beside.of(smallest):,} {beside.unit}; allow more of either"
        )
    price = _price_of_second(cost, losses, beside)
    for _ in range(_RAISES):
        if beside.keeps(picks := _pick(cost, _priced(losses, price, beside))):
            return picks, price
        price *= _RAISE
    # budgets so tight that no price says which candidates keep both
    return smallest, 0.0


def _price_of_second(cost: Cost, losses: Sequence[Sequence[float]], beside: Cost) -> float:
    """The price at which candidates that prices alone choose, whole or not, keep both budgets."""
    table, first, second = _table(losses, math.inf), _table(cost.costs), _table(beside.costs)

    def exceeds(price: float) -> bool:
        priced = table + price * second
        _, picks = _least(priced, first, _price(priced, first, cost.budget))
        return float(second.gather(1, picks).sum()) > beside.budget

    return _smallest_price(exceeds)


def _pick(cost: Cost, losses: Sequence[Sequence[float]]) -> list[int]:
    """Candidates of least loss within a budget that is at least what the cheapest ones need."""
    costs = cost.costs
    spare = cost.budget - cost.least
    # costs of layers have large divisors in common, and in multiples of those nothing is rounded; where the cheapest ones
    # nearly fill the budget, steps of what is left are finer than steps of all
    common = math.gcd(*(own - min(layer) for layer in costs for own in layer)) or 1
    step = max(common, -(-spare // STEPS))
    best = torch.zeros(spare // step + 1, dtype=torch.float64)
    picked: list[tuple[torch.Tensor, list[int]]] = []
    for layer_costs, layer_losses in zip(costs, losses, strict=True):
        steps = [-(-(own - min(layer_costs)) // step) for own in layer_costs]
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


def check_budget(cost: Cost) -> None:
    """Refuse a budget that not even the cheapest candidates keep.

    Raises:
        OptionError: when they exceed it.
    """
    least = cost.least
    if least > cost.budget:
        raise OptionError(
            f"the budget is {cost.budget:,} {cost.unit}, the smallest candidates of all layers need {least:,}; allow more"
        )


def lower_bound(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> float:
    """The largest value of the Lagrangian dual: min over candidates of loss + price · cost, minus price · budget."""
    table, cost = _table(losses, math.inf), _table(costs)
    return max(float(_least(table, cost, price)[0].sum()) - price * budget for price in (0.0, _price(table, cost, budget)))


def _price(losses: torch.Tensor, costs: torch.Tensor, budget: int) -> float:
    """The smallest price at which every layer's best candidate keeps the budget; losses and costs [layers, candidates]."""
    return _smallest_price(lambda price: float(costs.gather(1, _least(losses, costs, price)[1]).sum()) > budget)


def _least(losses: torch.Tensor, costs: torch.Tensor, price: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least loss of every layer, price included, and the cheapest candidate that has it, both [layers, 1]."""
    values = losses + price * costs
    least = values.amin(1, keepdim=True)
    return least, torch.where(values == least, costs, math.inf).argmin(1, keepdim=True)


def _smallest_price(exceeds: Callable[[float], bool]) -> float:
    """The smallest price at which a budget is no longer exceeded, from above; 0 where it is not without one."""
    if not exceeds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while exceeds(high) and high < _MOST:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        low, high = (price, high) if exceeds(price) else (low, price)
    return high


def _table(values: Sequence[Sequence[float]], missing: float = 0.0) -> torch.Tensor:
    """Values as [layers, candidates], with another value where a layer has fewer."""
    rows = [torch.tensor(layer, dtype=torch.float64) for layer in values]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=missing)
