"""The allocation against every possible choice."""

import itertools
import random

import pytest

from spmconvert.budget.knapsack import choose, lower_bound
from spmconvert.errors import OptionError


def problem(seed, layers, candidates, scale=1):
    draw = random.Random(seed)
    costs = [[draw.randint(1, 60) * scale for _ in range(candidates)] for _ in range(layers)]
    losses = [[draw.random() * 10 / cost for cost in own] for own in costs]
    return costs, losses


def exhaustive(costs, losses, budget):
    found = []
    for chosen in itertools.product(*(range(len(own)) for own in costs)):
        if sum(own[i] for own, i in zip(costs, chosen, strict=True)) <= budget:
            found.append(sum(own[i] for own, i in zip(losses, chosen, strict=True)))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1, 99_991])
def test_choice_is_the_best_one(seed, scale):
    costs, losses = problem(seed, layers=5, candidates=4, scale=scale)
    budget = int(0.4 * sum(max(own) for own in costs))
    choice = choose(costs, losses, budget, "bytes")
    assert choice.cost <= budget
    assert choice.cost == sum(own[i] for own, i in zip(costs, choice.chosen, strict=True))
    best = exhaustive(costs, losses, budget)
    assert choice.loss == pytest.approx(best, rel=1e-12)
    assert choice.bound <= best + 1e-12
    assert choice.bound > 0


def test_bound_is_tight_for_many_layers():
    costs, losses = problem(0, layers=200, candidates=12, scale=1000)
    budget = int(0.3 * sum(max(own) for own in costs))
    choice = choose(costs, losses, budget, "bytes")
    assert choice.loss <= 1.01 * lower_bound(costs, losses, budget)


def test_budget_edges():
    costs, losses = [[3, 5], [2, 9]], [[1.0, 0.5], [1.0, 0.0]]
    assert choose(costs, losses, 5, "bytes").chosen == (0, 0)
    assert choose(costs, losses, 10**12, "bytes").chosen == (1, 1)
    with pytest.raises(OptionError, match="budget is 4 bytes, the smallest candidates of all layers need 5"):
        choose(costs, losses, 4, "bytes")
