"""Choose a design for every layer so that the whole model loses least within a budget.

Layers whose dense form is the best use of the budget are left alone. Experts of a layer share one design a projection, and
are chosen as one.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from spmconvert.budget.candidates import Candidate
from spmconvert.budget.curves import Curves
from spmconvert.budget.knapsack import Choice, Cost, check_budget, choose
from spmconvert.budget.times import TimeTable
from spmconvert.errors import OptionError
from spmconvert.operator.design import Design
from spmconvert.operator.terms.registry import term_class
from spmconvert.plan.plan import DTYPE_BYTES, ConversionPlan, LayerPlan
from spmconvert.plan.targets import Skipped
from spmconvert.recipe.recipe import Budget

# shares of the targeted parameters that a dry run compares
COMPARED_BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75)
NANOSECONDS = 1e9


@dataclass(frozen=True)
class Limit:
    """What a budget allows, counted in its unit.

    Attributes:
        budget: the recipe's.
        layers: the targeted layers.
        times: of layers on this machine; None where slower designs are allowed and nothing is limited by time.
        seconds: what the targeted layers may take together, where the budget is one of time.
    """

    budget: Budget
    layers: tuple[LayerPlan, ...]
    times: TimeTable | None = None
    seconds: float | None = None

    @property
    def beside(self) -> "Limit | None":
        """The limit of size that stands beside one of time; None where there is one limit alone."""
        budget = self.budget.without_speedup
        return None if budget is None else replace(self, budget=budget)

    @property
    def parts(self) -> list["Limit"]:
        """The limits that are kept at once."""
        return [self] if self.beside is None else [self, self.beside]

    @property
    def total(self) -> int:
        """The most that all layers may cost together."""
        budget = self.budget
        if budget.speedup is not None:
            assert self.seconds is not None
            return int(self.seconds * NANOSECONDS)
        if budget.keep_bytes is not None:
            return budget.keep_bytes
        if budget.keep_flops is not None:
            return int(budget.keep_flops * sum(layer.flops[0] for layer in self.layers))
        return int((budget.keep or 1.0) * sum(layer.dense_parameters for layer in self.layers))

    def cost(self, layer: LayerPlan, design: Design | None) -> int:
        """What a design of a layer costs; None is the dense layer."""
        budget = self.budget
        if budget.speedup is not None:
            return int(self.seconds_of(layer, design) * NANOSECONDS)
        if budget.keep_flops is not None:
            return layer.flops[0] if design is None else layer.flops_of(design)
        if budget.keep_bytes is not None:
            item = DTYPE_BYTES[layer.stored_dtype]
            return layer.dense_bytes if design is None else replace(layer.spec, design=design).stored_bytes(item)
        return layer.dense_parameters if design is None else replace(layer.spec, design=design).parameter_count()

    def seconds_of(self, layer: LayerPlan, design: Design | None) -> float:
        """Seconds that a design of a layer takes for those of the tokens that it sees; None is the dense layer."""
        times, calls = self._calls(layer)
        sizes = (layer.target.in_features, layer.target.out_features)
        return calls * (times.dense(*sizes) if design is None else times.seconds(design))

    def drops(self, layer: LayerPlan, design: Design) -> bool:
        """Whether a design of a layer is no candidate, because it is slower than the dense one."""
        if self.budget.allow_slower or self.times is None:
            return False
        return self._calls(layer)[0].is_slower(design)

    def _calls(self, layer: LayerPlan) -> tuple[TimeTable, int]:
        """Times for the tokens of one call of a layer, and how often it is called."""
        assert self.times is not None
        if layer.target.stepwise:
            return self.times.at(self.budget.rows), self.budget.tokens
        return self.times.at(max(1, round(layer.target.share * self.times.tokens))), 1


_PICKED: TypeAdapter[tuple[Candidate | None, ...]] = TypeAdapter(tuple[Candidate | None, ...])
_CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)
_DROPPED: TypeAdapter[tuple[int, int]] = TypeAdapter(tuple[int, int])


@dataclass(frozen=True)
class Allocation:
    """What a budget is spent on.

    Attributes:
        plan: the conversion with the chosen designs; layers that stay dense are left out.
        choice: the solver's answer.
        picked: the chosen candidate of every targeted layer, None for those that stay dense.
        dropped: candidates that were slower than the dense layer, and how many there were in all.
    """

    plan: ConversionPlan
    choice: Choice
    picked: tuple[Candidate | None, ...]
    dropped: tuple[int, int] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        """The choice alone, as plain values."""
        picked = [candidate and asdict(candidate) for candidate in self.picked]
        return {"choice": asdict(self.choice), "picked": picked, "dropped": self.dropped}

    @classmethod
    def from_json(cls, plan: ConversionPlan, record: dict[str, Any]) -> "Allocation":
        """The allocation that was written for the same targeted layers.

        Raises:
            ValueError: when it is none.
        """
        picked = _PICKED.validate_python(record.get("picked"))
        choice = _CHOICE.validate_python(record.get("choice"))
        return cls(_planned(plan, picked), choice, picked, _DROPPED.validate_python(record.get("dropped")))


def check_reachable(limit: Limit) -> None:
    """Refuse a budget before anything is measured.

    Raises:
        OptionError: when the smallest designs exceed it, or it allows all layers as they are.
    """
    budget = limit.budget
    if budget.speedup is not None and limit.beside is not None:
        check_reachable(limit.beside)
    if budget.max_error is not None or budget.speedup is not None:
        return
    costs = []
    for layer in limit.layers:
        smallest = smallest_designs(layer, budget)
        costs.append([limit.cost(layer, design) for design in (*smallest, None)])
    dense = sum(layer_costs[-1] for layer_costs in costs)
    check_budget(Cost(costs, limit.total, budget.unit))
    if limit.total >= dense:
        raise OptionError(
            f"{next(iter(budget.limits))} allows {limit.total:,} {budget.unit}, and the targeted layers have {dense:,} as "
            "they are; allow less"
        )


def smallest_designs(layer: LayerPlan, budget: Budget) -> list[Design]:
    """The smallest design of every structure that has one at all sizes."""
    sizes = (layer.target.in_features, layer.target.out_features)
    dense = sizes[0] * sizes[1] - 1
    found = []
    for kind in budget.structures:
        terms = term_class(kind).designs(*sizes, sum(sizes)) or term_class(kind).designs(*sizes, dense)
        found += [Design(*sizes, (term,)) for term in terms]
    return found


def allocate(curves: Curves, limit: Limit) -> Allocation:
    """Choose for a budget among what is known.

    Raises:
        OptionError: when the smallest candidates exceed the budget, or no layer would change.
    """
    budget, layers = limit.budget, curves.plan.layers
    units = _units(layers)
    candidates = curves.candidates
    options: list[list[Option]] = []
    limits = limit.parts
    costs: list[list[list[int]]] = [[] for _ in limits]
    known = 0
    for unit in units:
        first = layers[unit[0]]
        sizes = (first.target.in_features, first.target.out_features)
        shared = _shared([candidates[index] for index in unit])
        kept = [(one, design) for one in shared if not limit.drops(first, design := one[0].design(*sizes))]
        known += len(shared)
        options.append([*(one for one, _ in kept), None])
        # all of a unit are of one shape
        designs = [*(design for _, design in kept), None]
        for by_layer, one in zip(costs, limits, strict=True):
            by_layer.append([len(unit) * one.cost(first, design) for design in designs])
    dropped = known - sum(len(own) - 1 for own in options)
    if known and dropped == known:
        raise OptionError(_why_dense(budget, dropped, known))
    losses = [[0.0 if option is None else sum(one.loss for one in option) for option in own] for own in options]
    if budget.max_error is not None:
        choice = _within_error(options, costs[0], losses, budget.max_error)
    else:
        allowed = [Cost(by_layer, one.total, one.budget.unit) for by_layer, one in zip(costs, limits, strict=True)]
        if dropped:
            _check_left(allowed, budget, dropped, known)
        choice = choose(allowed[0], losses, *allowed[1:])
    picked: list[Candidate | None] = [None] * len(layers)
    chosen = [0] * len(layers)
    for unit, own, number in zip(units, options, choice.chosen, strict=True):
        for place, index in enumerate(unit):
            option = own[number]
            picked[index], chosen[index] = None if option is None else option[place], number
    choice = replace(choice, chosen=tuple(chosen))
    if not any(picked):
        raise OptionError(_why_dense(budget, dropped, known))
    return Allocation(_planned(curves.plan, picked), choice, tuple(picked), (dropped, known))


# a design of everything that has to have the same one, by layer; None where it stays dense
Option = tuple[Candidate, ...] | None


def _units(layers: Sequence[LayerPlan]) -> list[list[int]]:
    """Positions of layers that have to have the same design: experts of a layer, all others each alone."""
    units: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        units.setdefault(layer.target.group or layer.target.name, []).append(index)
    return list(units.values())


def _shared(candidates: Sequence[Sequence[Candidate]]) -> list[tuple[Candidate, ...]]:
    """Candidates of the same design of several layers, of designs that all of them know."""
    if len(candidates) == 1:
        return [(one,) for one in candidates[0]]
    by_design = [{json.dumps(one.terms, sort_keys=True): one for one in own} for own in candidates]
    return [
        tuple(own[design] for own in by_design) for design in by_design[0] if all(design in own for own in by_design[1:])
    ]


def _why_dense(budget: Budget, dropped: int, known: int) -> str:
    if dropped == known:
        return (
            f"all candidates are slower than the dense layers at {budget.batch_tokens} tokens on this device; give "
            "--allow-slower to make the model smaller only, or other --tokens"
        )
    remedy = "allow less" if budget.max_error is None else f"allow a larger error than {budget.max_error:g}"
    return f"{' and '.join(budget.limits)} leaves every layer dense; {remedy}"


def _check_left(allowed: Sequence[Cost], budget: Budget, dropped: int, known: int) -> None:
    """Say so where a budget is too small only because slower candidates are none.

    Raises:
        OptionError: then.
    """
    for cost in allowed:
        if cost.least > cost.budget:
            raise OptionError(
                f"{dropped:,} of {known:,} candidates are slower than the dense layers at {budget.batch_tokens} tokens on "
                f"this device, and the others need at least {cost.least:,} of the {cost.budget:,} {cost.unit} that are "
                "allowed; give --allow-slower to make the model smaller only, allow more, or give other --tokens"
            )


def _within_error(
    options: Sequence[Sequence[Option]],
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    max_error: float,
) -> Choice:
    """The smallest candidate of every layer whose error is allowed; the dense layer is one."""
    chosen = []
    for own, own_costs in zip(options, costs, strict=True):
        allowed = [
            index for index, option in enumerate(own) if option is None or all(one.error <= max_error for one in option)
        ]
        chosen.append(min(allowed, key=lambda index: own_costs[index]))
    cost = sum(own[index] for own, index in zip(costs, chosen, strict=True))
    return Choice(tuple(chosen), cost, sum(own[index] for own, index in zip(losses, chosen, strict=True)), bound=0.0)


def choice_record(choice: Choice, budget: Budget) -> dict[str, Any]:
    """What a choice costs and is predicted to lose, as plain values."""
    record: dict[str, Any] = {
        "predicted_loss": choice.loss,
        "lower_bound": choice.bound,
        "cost": choice.cost,
        "limit": choice.limit,
        "unit": budget.unit,
    }
    if choice.beside is not None and (size := budget.without_speedup) is not None:
        cost, limit = choice.beside
        record["beside"] = {"cost": cost, "limit": limit, "unit": size.unit}
    return record


def describe_choice(allocation: Allocation, budget: Budget) -> str:
    """The same in words."""
    choice = allocation.choice
    amount, limit = (_amount(number, budget) for number in (choice.cost, choice.limit or 0))
    allowed = "" if choice.limit is None else f" of the {limit} allowed"
    if choice.beside is not None and (size := budget.without_speedup) is not None:
        allowed += f", {choice.beside[0]:,} {size.unit} of {choice.beside[1]:,}"
    dropped, known = allocation.dropped
    slower = f"; {dropped:,} of {known:,} candidates are slower than dense and were dropped" if dropped else ""
    return f"{amount} {budget.shown_unit}{allowed}, {budget.loss_name} {choice.loss:.4g}{slower}"


def _amount(number: int, budget: Budget) -> str:
    return f"{number / 1e6:.4g}" if budget.speedup is not None else f"{number:,}"


def compare_budgets(curves: Curves, limit: Limit) -> list[dict[str, Any]]:
    """What every budget would buy, as plain values; budgets below the smallest designs are left out."""
    rows = []
    total = sum(layer.dense_parameters for layer in curves.plan.layers)
    for keep in COMPARED_BUDGETS:
        budget = Budget(keep=keep, allow_slower=limit.budget.allow_slower)
        try:
            allocation = allocate(curves, replace(limit, budget=budget))
        except OptionError:
            continue
        rows.append({"keep": keep, "kept": allocation.choice.cost / total, **budget_row(allocation)})
    return rows


def budget_row(allocation: Allocation) -> dict[str, Any]:
    """What a choice loses and what its layers are, as plain values."""
    kinds = Counter("+".join(one.kinds) if one is not None else "dense" for one in allocation.picked)
    return {
        "predicted_loss": allocation.choice.loss,
        "lower_bound": allocation.choice.bound,
        "layers": dict(sorted(kinds.items())),
        "output_bytes": allocation.plan.output_bytes,
    }


def _planned(plan: ConversionPlan, picked: Sequence[Candidate | None]) -> ConversionPlan:
    layers, dense = [], []
    for layer, candidate in zip(plan.layers, picked, strict=True):
        if candidate is None:
            dense.append(layer)
        else:
            design = candidate.design(layer.target.in_features, layer.target.out_features)
            layers.append(replace(layer, spec=replace(layer.spec, design=design)))
    skipped = [Skipped(layer.target.name, "dense is the best use of the budget") for layer in dense]
    selection = replace(
        plan.selection,
        targets=tuple(layer.target for layer in layers),
        skipped=(*plan.selection.skipped, *skipped),
    )
    return ConversionPlan(tuple(layers), selection, plan.other_bytes + sum(layer.dense_bytes for layer in dense))
