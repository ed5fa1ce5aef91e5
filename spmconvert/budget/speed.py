"""A budget in time: what the whole model's forward pass takes, and what that leaves for the targeted layers.

The dense model is timed as a whole; what its targeted layers do not take, by their own times, no design changes. A choice
of designs is timed as a whole too, before anything is fitted, since times do not depend on values: where it misses the
target, the layers are given less and the choice is made again.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spmconvert.budget.allocation import Allocation, Limit
from spmconvert.errors import OptionError
from spmconvert.model.swap import copy_sharing_tensors, layer_from_spec, replace_module
from spmconvert.operator.design import Design
from spmconvert.outputs.probe import token_rows_batch
from spmconvert.plan.plan import ConversionPlan
from spmconvert.recipe.recipe import Budget
from spmconvert.system.timing import interleaved_seconds

SECONDS = 4.0
# a target is tightened by what was missed and so much more of it, since times of two runs differ
TIGHTENING = 1.25
TRIES = 3


@dataclass(frozen=True)
class WholeModel:
    """Times of the dense model's forward pass.

    Attributes:
        dense: seconds of the whole pass.
        layers: seconds of its targeted layers together, by their own times.
    """

    dense: float
    layers: float

    @property
    def rest(self) -> float:
        """Seconds that no design changes."""
        return max(self.dense - self.layers, 0.0)

    def speedup(self, seconds: float) -> float:
        """How many times faster the model is when its targeted layers take so many seconds together."""
        return self.dense / (self.rest + seconds)

    def allowed(self, speedup: float) -> float:
        """Seconds that the targeted layers may take together."""
        return self.dense / speedup - self.rest


def forward_seconds(models: Mapping[str, Any], budget: Budget, device: str, seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of a forward pass of every model, in turn within one run.

    Raises:
        OptionError: when a model reads no tokens.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        if model.main_input_name != "input_ids":
            raise OptionError(f"--speedup times rows of tokens, and {type(model).__name__} reads none; use --keep instead")
        calls[name] = _call(model, token_rows_batch(model, budget.rows, budget.tokens))
    times = interleaved_seconds(calls, seconds, device)
    return {name: statistics.median(values) for name, values in times.items()}


def _call(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(**batch)

    return call


def time_whole_model(model: Any, limit: Limit, device: str) -> WholeModel:
    """Time the dense model."""
    return whole_model(forward_seconds({"dense": model}, limit.budget, device)["dense"], limit)


def whole_model(dense: float, limit: Limit) -> WholeModel:
    """The times of a dense model whose forward pass takes so many seconds."""
    assert limit.times is not None
    times = limit.times
    return WholeModel(
        dense, sum(times.dense(layer.target.in_features, layer.target.out_features) for layer in limit.layers)
    )


def check_speedup(whole: WholeModel, limit: Limit, smallest: Callable[[Any], list[Design]]) -> None:
    """Refuse a speed-up that the smallest designs do not reach.

    Raises:
        OptionError: when they do not; it names the largest value that they reach.
    """
    times, wanted = limit.times, limit.budget.speedup
    assert times is not None
    assert wanted is not None
    fastest = 0.0
    for layer in limit.layers:
        dense = times.dense(layer.target.in_features, layer.target.out_features)
        fastest += min([dense, *(times.seconds(design) for design in smallest(layer))])
    reachable = whole.speedup(fastest)
    if wanted > reachable:
        shape = f"{limit.budget.rows} x {limit.budget.tokens} tokens"
        raise OptionError(
            f"speedup {wanted:g} is out of reach: with the smallest designs the model is {reachable:.2f} times faster at "
            f"{shape} on this device; ask for less, or target more layers"
        )


def with_fresh_layers(model: Any, plan: ConversionPlan) -> Any:
    """The model with fresh layers of the planned designs, sharing every other tensor."""
    converted = copy_sharing_tensors(model)
    for layer in plan.layers:
        dense = model.get_submodule(layer.target.name)
        built = layer_from_spec(layer.spec, device=dense.weight.device).to(dense.weight.dtype)
        replace_module(converted, layer.target.name, built.eval().requires_grad_(False))
    return converted


def search_for_speed(
    model: Any, limit: Limit, whole: WholeModel, search: Callable[[float], Allocation], device: str
) -> tuple[Allocation, float, float]:
    """Search designs until the whole model reaches the target, or tries are used up.

    Args:
        model: the dense model.
        limit: the budget.
        whole: times of the dense model.
        search: finds designs whose layers take at most so many seconds together.
        device: where.

    Returns:
        The designs, the speed-up that their times predict, and the one that was measured.

    Raises:
        OptionError: when the time that is left is too little for any designs.
    """
    wanted = limit.budget.speedup
    assert wanted is not None
    seconds = whole.allowed(wanted)
    for attempt in range(TRIES):
        allocation = search(seconds)
        predicted = whole.speedup(allocation.choice.cost / 1e9)
        times = forward_seconds(
            {"dense": model, "converted": with_fresh_layers(model, allocation.plan)}, limit.budget, device
        )
        measured = times["dense"] / times["converted"]
        if measured >= wanted or attempt == TRIES - 1:
            break
        seconds -= TIGHTENING * whole.dense * (1 / measured - 1 / wanted)
    return allocation, predicted, measured
