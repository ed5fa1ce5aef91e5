"""The allocation against every possible choice."""

import itertools
import math
import random

import pytest

from spmconvert.budget.knapsack import Cost, choose, lower_bound
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
    choice = choose(Cost(costs, budget, "bytes"), losses)
    assert choice.cost <= budget
    assert choice.cost == sum(own[i] for own, i in zip(costs, choice.chosen, strict=True))
    best = exhaustive(costs, losses, budget)
    assert choice.loss == pytest.approx(best, rel=1e-12)
    assert choice.bound <= best + 1e-12
    assert choice.bound > 0


def test_bound_is_tight_for_many_layers():
    costs, losses = problem(0, layers=200, candidates=12, scale=1000)
    budget = int(0.3 * sum(max(own) for own in costs))
    choice = choose(Cost(costs, budget, "bytes"), losses)
    assert choice.loss <= 1.01 * lower_bound(costs, losses, budget)


def test_budget_edges():
    costs, losses = [[3, 5], [2, 9]], [[1.0, 0.5], [1.0, 0.0]]
    assert choose(Cost(costs, 5, "bytes"), losses).chosen == (0, 0)
    assert choose(Cost(costs, 10**12, "bytes"), losses).chosen == (1, 1)
    with pytest.raises(OptionError, match="budget is 4 bytes, the smallest candidates of all layers need 5"):
        choose(Cost(costs, 4, "bytes"), losses)


def test_a_budget_that_the_cheapest_fill_is_not_exceeded():
    choice = choose(Cost([[10, 11]], 10, "x"), [[1, 0]])
    assert (choice.chosen, choice.cost) == ((0,), 10)


@pytest.mark.parametrize("seed", range(40))
def test_no_budget_is_exceeded_and_none_is_wasted(seed):
    draw = random.Random(seed)
    costs, losses = problem(seed, layers=draw.randint(1, 4), candidates=draw.randint(1, 4), scale=draw.choice([1, 7]))
    least = sum(min(layer) for layer in costs)
    for budget in (least, least + 1, least + draw.randint(0, 50), 10**6):
        choice = choose(Cost(costs, budget, "x"), losses)
        assert choice.cost <= budget
        assert choice.loss == pytest.approx(exhaustive(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_chosen(loss):
    choice = choose(Cost([[5, 1, 3], [4, 2, 9]], 8, "x"), [[0.0, loss, 2.0], [1.0, 3.0, loss]])
    assert choice.chosen == (2, 0)
    assert math.isfinite(choice.bound)
    with pytest.raises(OptionError, match="layer 2 of 2 has no candidate with a finite loss"):
        choose(Cost([[1], [1]], 8, "x"), [[0.0], [loss]])


def exhaustive_within_both(costs, others, losses, budget, other_budget):
    found = []
    for chosen in itertools.product(*(range(len(own)) for own in costs)):
        sums = [sum(own[i] for own, i in zip(values, chosen, strict=True)) for values in (costs, others, losses)]
        if sums[0] <= budget and sums[1] <= other_budget:
            found.append(sums[2])
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_two_limits_are_kept_at_once_and_the_bound_is_one(seed):
    costs, losses = problem(seed, layers=6, candidates=5)
    draw = random.Random(seed + 100)
    others = [[draw.randint(1, 60) for _ in own] for own in costs]
    budget, other = (int(0.5 * sum(max(own) for own in values)) for values in (costs, others))
    choice = choose(Cost(costs, budget, "bytes"), losses, Cost(others, other, "parameters"))
    cost, second = (sum(own[i] for own, i in zip(values, choice.chosen, strict=True)) for values in (costs, others))
    assert choice.cost == cost <= budget
    assert choice.beside == (second, other)
    assert second <= other
    assert choice.loss == pytest.approx(sum(own[i] for own, i in zip(losses, choice.chosen, strict=True)), rel=1e-12)
    best = exhaustive_within_both(costs, others, losses, budget, other)
    assert choice.bound <= best + 1e-12
    assert choice.loss >= best - 1e-12


def test_a_second_limit_is_spent_nearly_as_well_as_it_can_be():
    costs, losses = problem(3, layers=200, candidates=12, scale=1000)
    draw = random.Random(5)
    others = [[draw.randint(1, 60) * 1000 for _ in own] for own in costs]
    budget, other = (int(0.3 * sum(max(own) for own in values)) for values in (costs, others))
    alone = choose(Cost(costs, budget, "bytes"), losses)
    both = choose(Cost(costs, budget, "bytes"), losses, Cost(others, other, "parameters"))
    assert sum(own[i] for own, i in zip(others, alone.chosen, strict=True)) > other, "the second one limits something"
    assert alone.loss < both.loss <= 1.03 * both.bound


def test_a_second_limit_that_is_kept_anyway_changes_nothing():
    costs, losses = problem(1, layers=5, candidates=4)
    budget = int(0.4 * sum(max(own) for own in costs))
    alone = choose(Cost(costs, budget, "bytes"), losses)
    both = choose(Cost(costs, budget, "bytes"), losses, Cost(costs, 10**9, "parameters"))
    assert (both.chosen, both.loss, both.bound) == (alone.chosen, alone.loss, alone.bound)


def test_limits_that_no_choice_keeps_at_once_are_refused():
    # what is cheap by one is dear by the other
    costs, others = [[1, 9], [1, 9]], [[9, 1], [9, 1]]
    losses = [[0.0, math.inf], [0.5, 0.5]]
    message = "5 bytes and 5 parameters are not to be had at once: within the first, .* need 18 parameters; allow more"
    with pytest.raises(OptionError, match=message):
        choose(Cost(costs, 5, "bytes"), [[0.0, 1.0], [0.5, 0.5]], Cost(others, 5, "parameters"))
    with pytest.raises(OptionError, match="the budget is 9 parameters, the smallest candidates of all layers need 10"):
        choose(Cost(costs, 50, "bytes"), losses, Cost(others, 9, "parameters"))
