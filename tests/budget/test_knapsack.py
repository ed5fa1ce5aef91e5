"""The allocation against every possible choice."""

import itertools
import math
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


def test_a_budget_that_the_cheapest_fill_is_not_exceeded():
    choice = choose([[10, 11]], [[1, 0]], 10, "x")
    assert (choice.chosen, choice.cost) == ((0,), 10)


@pytest.mark.parametrize("seed", range(40))
def test_no_budget_is_exceeded_and_none_is_wasted(seed):
    draw = random.Random(seed)
    costs, losses = problem(seed, layers=draw.randint(1, 4), candidates=draw.randint(1, 4), scale=draw.choice([1, 7]))
    least = sum(min(layer) for layer in costs)
    for budget in (least, least + 1, least + draw.randint(0, 50), 10**6):
        choice = choose(costs, losses, budget, "x")
        assert choice.cost <= budget
        assert choice.loss == pytest.approx(exhaustive(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_chosen(loss):
    choice = choose([[5, 1, 3], [4, 2, 9]], [[0.0, loss, 2.0], [1.0, 3.0, loss]], 8, "x")
    assert choice.chosen == (2, 0)
    assert math.isfinite(choice.bound)
    with pytest.raises(OptionError, match="layer 2 of 2 has no candidate with a finite loss"):
        choose([[1], [1]], [[0.0], [loss]], 8, "x")
