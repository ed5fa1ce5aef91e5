"""Choose a design for every layer so that the whole model loses least within a budget.

Layers whose dense form is the best use of the budget are left alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spmconvert.budget.candidates import Candidate, candidate_geometries
from spmconvert.budget.curves import Curves
from spmconvert.budget.knapsack import Choice, check_budget, choose
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.errors import OptionError
from spmconvert.plan.plan import DTYPE_BYTES, ConversionPlan, LayerPlan
from spmconvert.plan.targets import Skipped
from spmconvert.recipe.recipe import Budget

# shares of the targeted parameters that a dry run compares
COMPARED_BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Allocation:
    """What a budget is spent on.

    Attributes:
        plan: the conversion with the chosen designs; layers that stay dense are left out.
        choice: the solver's answer.
        picked: the chosen candidate of every targeted layer, None for those that stay dense.
    """

    plan: ConversionPlan
    choice: Choice
    picked: tuple[Candidate | None, ...]

    def to_json(self) -> bytes:
        """The choice alone, for a run that goes on from finished layers."""
        picked = [candidate and asdict(candidate) for candidate in self.picked]
        return json.dumps({"choice": asdict(self.choice), "picked": picked}).encode()

    @classmethod
    def from_json(cls, plan: ConversionPlan, content: bytes) -> "Allocation":
        """The allocation that was written for the same targeted layers."""
        record = json.loads(content)
        picked = tuple(None if fields is None else Candidate(**fields) for fields in record["picked"])
        choice = Choice(**{**record["choice"], "chosen": tuple(record["choice"]["chosen"])})
        return cls(_planned(plan, picked), choice, picked)


def check_reachable(plan: ConversionPlan, budget: Budget) -> None:
    """Refuse a budget before anything is measured.

    Raises:
        OptionError: when the smallest designs exceed it, or it allows all layers as they are.
    """
    if budget.max_error is not None:
        return
    costs = []
    for layer in plan.layers:
        sizes = (layer.target.in_features, layer.target.out_features)
        geometries = [g for structure in budget.structures for g in candidate_geometries(*sizes, structure)]
        options = [Candidate(g.stages, g.block, g.rank, 0.0, 0.0) for g in geometries]
        costs.append([_cost(layer, option, budget) for option in (*options, None)])
    limit, dense = _limit(plan.layers, budget), sum(layer_costs[-1] for layer_costs in costs)
    check_budget(costs, limit, budget.unit)
    if limit >= dense:
        raise OptionError(
            f"{next(iter(budget.limits))} allows {limit:,} {budget.unit}, and the targeted layers have {dense:,} as they "
            "are; allow less"
        )


def allocate(curves: Curves, budget: Budget) -> Allocation:
    """Choose for a budget.

    Raises:
        OptionError: when the smallest candidates exceed the budget, or no layer would change.
    """
    layers = curves.plan.layers
    options = [(*candidates, None) for candidates in curves.candidates]
    losses = [[0.0 if option is None else option.loss for option in layer_options] for layer_options in options]
    if budget.max_error is not None:
        chosen = tuple(
            _smallest(layer, layer_options, budget.max_error) for layer, layer_options in zip(layers, options, strict=True)
        )
        loss = sum(layer_losses[index] for layer_losses, index in zip(losses, chosen, strict=True))
        picks = zip(layers, options, chosen, strict=True)
        size = sum(_parameters(layer, layer_options[index]) for layer, layer_options, index in picks)
        choice = Choice(chosen, size, loss, bound=0.0)
    else:
        costs = [
            [_cost(layer, option, budget) for option in layer_options]
            for layer, layer_options in zip(layers, options, strict=True)
        ]
        choice = choose(costs, losses, _limit(layers, budget), budget.unit)
    picked = tuple(layer_options[index] for layer_options, index in zip(options, choice.chosen, strict=True))
    if not any(picked):
        remedy = "allow less" if budget.max_error is None else f"allow a larger error than {budget.max_error:g}"
        raise OptionError(f"{next(iter(budget.limits))} leaves every layer dense; {remedy}")
    return Allocation(_planned(curves.plan, picked), choice, picked)


def choice_record(choice: Choice, budget: Budget) -> dict[str, Any]:
    """What a choice costs and is predicted to lose, as plain values."""
    return {
        "predicted_loss": choice.loss,
        "lower_bound": choice.bound,
        "cost": choice.cost,
        "limit": choice.limit,
        "unit": budget.unit,
    }


def describe_choice(choice: Choice, budget: Budget) -> str:
    """The same in words."""
    allowed = "" if choice.limit is None else f" of the {choice.limit:,} allowed"
    return f"{choice.cost:,} {budget.unit}{allowed}, {budget.loss_name} {choice.loss:.4g}"


def compare_budgets(curves: Curves) -> list[dict[str, Any]]:
    """What every budget would buy, as plain values; budgets below the smallest designs are left out."""
    rows = []
    total = sum(layer.dense_parameters for layer in curves.plan.layers)
    for keep in COMPARED_BUDGETS:
        try:
            allocation = allocate(curves, Budget(keep=keep))
        except OptionError:
            continue
        layers = allocation.plan.layers
        geometries = [layer.spec.geometry for layer in layers]
        rows.append(
            {
                "keep": keep,
                "kept": allocation.choice.cost / total,
                "predicted_loss": allocation.choice.loss,
                "lower_bound": allocation.choice.bound,
                "low_rank": sum(g.stages == 0 for g in geometries),
                "stages": sum(g.stages > 0 and g.rank == 0 for g in geometries),
                "stages_with_companion": sum(g.stages > 0 and g.rank > 0 for g in geometries),
                "dense": len(curves.plan.layers) - len(layers),
                "output_bytes": allocation.plan.output_bytes,
            }
        )
    return rows


def _parameters(layer: LayerPlan, candidate: Candidate | None) -> int:
    """Parameters of a candidate; None is the dense layer."""
    return layer.dense_parameters if candidate is None else _spec(layer, candidate).parameter_count()


def _cost(layer: LayerPlan, candidate: Candidate | None, budget: Budget) -> int:
    """In the budget's unit."""
    if budget.keep_flops is not None:
        return layer.flops[0] if candidate is None else _spec(layer, candidate).geometry.flops_per_token()
    if budget.keep_bytes is None:
        return _parameters(layer, candidate)
    return layer.dense_bytes if candidate is None else _parameters(layer, candidate) * DTYPE_BYTES[layer.stored_dtype]


def _limit(layers: Sequence[LayerPlan], budget: Budget) -> int:
    if budget.keep_bytes is not None:
        return budget.keep_bytes
    if budget.keep_flops is not None:
        return int(budget.keep_flops * sum(layer.flops[0] for layer in layers))
    return int((budget.keep or 1.0) * sum(layer.dense_parameters for layer in layers))


def _smallest(layer: LayerPlan, options: Sequence[Candidate | None], max_error: float) -> int:
    """Index of the smallest candidate whose error is allowed; the dense layer is one."""
    allowed = [index for index, option in enumerate(options) if option is None or option.error <= max_error]
    return min(allowed, key=lambda index: _parameters(layer, options[index]))


def _spec(layer: LayerPlan, candidate: Candidate) -> LayerSpec:
    return replace(layer.spec, geometry=candidate.geometry(layer.target.in_features, layer.target.out_features))


def _planned(plan: ConversionPlan, picked: Sequence[Candidate | None]) -> ConversionPlan:
    layers, dense = [], []
    for layer, candidate in zip(plan.layers, picked, strict=True):
        if candidate is None:
            dense.append(layer)
        else:
            layers.append(replace(layer, spec=_spec(layer, candidate)))
    skipped = [Skipped(layer.target.name, "dense is the best use of the budget") for layer in dense]
    selection = replace(
        plan.selection,
        targets=tuple(layer.target for layer in layers),
        skipped=(*plan.selection.skipped, *skipped),
    )
    return ConversionPlan(tuple(layers), selection, plan.other_bytes + sum(layer.dense_bytes for layer in dense))
