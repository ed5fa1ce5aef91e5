"""A budget in time: what the whole model's forward pass takes, and what that leaves for the targeted layers.

The dense model is timed as a whole, in turn with itself without its targeted layers: what is left then no design changes.
Times of single layers are scaled so that the dense ones add up to the rest. A choice of designs is timed as a whole too,
before anything is fitted, since times do not depend on values. Where it misses the target in two measurements, the layers
are given less and the choice is made again, once and by a little: on a busy machine a target that follows every measurement
ruins the model (SmolLM2-135M, 1.3 wanted: designs for 1.53, 5.20 nats instead of what 1.3 costs). Where it is beyond the
target in both, they are given more, and that is taken if it still reaches it, or else half of that: speed that nobody asked
for costs quality (SmolLM2-135M, 1.2 wanted and 1.30 measured: .2 nats above what 1.2 costs).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spmconvert.budget.allocation import Allocation, Limit
from spmconvert.data.tokens import inputs_of, reads_tokens
from spmconvert.errors import OptionError, OutOfReachError
from spmconvert.model.swap import as_it_runs, copy_sharing_tensors, layer_from_spec, replace_module, stack_
from spmconvert.operator.design import Design
from spmconvert.outputs.probe import token_rows_batch
from spmconvert.plan.plan import ConversionPlan
from spmconvert.recipe.recipe import Budget
from spmconvert.system.timing import compared_seconds, interleaved_seconds

SECONDS = 4.0
# a pass may take a second, and on a shared machine a fifth more or less than the one before
FEWEST_ROUNDS = 15
# what a choice aims at, in speed-ups that are wanted, so that most measurements are above that
AIM = 1.02
# share of the wanted speed-up below which a choice has missed it
MISSED = 0.97
# share of it above which a choice is faster than was asked for
BEYOND = 1.03
# most that a target is tightened by, or loosened
TIGHTENING = 1.1


@dataclass(frozen=True)
class WholeModel:
    """Times of the dense model's forward pass.

    Attributes:
        dense: seconds of the whole pass.
        rest: seconds that no design changes.
        layers: seconds of its targeted layers together, by their own times.
    """

    dense: float
    rest: float
    layers: float

    @property
    def scale(self) -> float:
        """Seconds that layers take inside of the model for each that they take by themselves."""
        return (self.dense - self.rest) / self.layers

    def speedup(self, seconds: float) -> float:
        """How many times faster the model is when its targeted layers take so many seconds, by their own times."""
        return self.dense / (self.rest + self.scale * seconds)

    def allowed(self, speedup: float) -> float:
        """Seconds that the targeted layers may take together, by their own times."""
        return (self.dense / speedup - self.rest) / self.scale


def forward_seconds(models: Mapping[str, Any], budget: Budget, device: str, seconds: float = SECONDS) -> dict[str, float]:
    """Seconds of a forward pass of every model, in turn within one run, as they compare with the first one's.

    Raises:
        OptionError: when a model reads no tokens.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        if not reads_tokens(model.config):
            what = inputs_of(model.config)
            raise OptionError(
                f"--speedup times rows of tokens, and {type(model).__name__} reads {what}; use --keep instead"
            )
        calls[name] = _call(model, token_rows_batch(model, budget.rows, budget.tokens))
    return compared_seconds(interleaved_seconds(calls, seconds, device, fewest=FEWEST_ROUNDS))


def _call(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(**batch)

    return call


def time_whole_model(model: Any, limit: Limit, device: str) -> WholeModel:
    """Time the dense model, and what is left of it without its targeted layers."""
    sizes = {layer.target.name: layer.target.out_features for layer in limit.layers}
    rest = with_layers(model, {name: _NoProduct(out_features) for name, out_features in sizes.items()})
    times = forward_seconds({"dense": as_it_runs(model), "rest": rest}, limit.budget, device)
    return whole_model(times["dense"], times["rest"], limit)


class _NoProduct(nn.Module):
    """What is left of a layer without its product: room for the outputs."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self._out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in_features] -> zeros [..., out_features]."""
        return x.new_zeros(*x.shape[:-1], self._out_features)


def whole_model(dense: float, rest: float, limit: Limit) -> WholeModel:
    """The times of a dense model whose forward pass takes so many seconds, and so many without its targeted layers."""
    layers = sum(limit.seconds_of(layer, None) for layer in limit.layers)
    # layers that take no time that can be measured
    return WholeModel(dense, min(rest, (1 - 1e-3) * dense), layers)


def check_speedup(whole: WholeModel, limit: Limit, smallest: Callable[[Any], list[Design]]) -> float:
    """Refuse a speed-up that the smallest designs do not reach.

    Returns:
        The one that they reach.

    Raises:
        OutOfReachError: when they do not; it names the largest value that they reach.
    """
    wanted = limit.budget.speedup
    assert wanted is not None
    fastest = 0.0
    for layer in limit.layers:
        fastest += min(limit.seconds_of(layer, design) for design in (None, *smallest(layer)))
    reachable = whole.speedup(fastest)
    if wanted > reachable:
        shape = f"{limit.budget.rows} x {limit.budget.tokens} tokens"
        raise OutOfReachError(
            f"speedup {wanted:g} is out of reach: with the smallest designs the model is {reachable:.2f} times faster at "
            f"{shape} on this device; ask for less, or target more layers"
        )
    return reachable


def aimed(wanted: float, most: float) -> float:
    """The speed-up that designs are chosen for, of which ``most`` can be reached."""
    return min(wanted * AIM, most)


def with_layers(model: Any, layers: Mapping[str, nn.Module]) -> Any:
    """The model with other layers by name, sharing every other tensor."""
    changed = copy_sharing_tensors(model)
    for name, layer in layers.items():
        replace_module(changed, name, layer.eval().requires_grad_(False))
    return changed


def with_fresh_layers(model: Any, plan: ConversionPlan) -> Any:
    """The model with fresh layers of the planned designs, sharing every other tensor."""
    fresh = {}
    for layer in plan.layers:
        dense = model.get_submodule(layer.target.name)
        fresh[layer.target.name] = layer_from_spec(layer.spec, device=dense.weight.device).to(dense.weight.dtype)
    changed = with_layers(model, fresh)
    stack_(changed)
    return changed


def search_for_speed(
    model: Callable[[], Any],
    limit: Limit,
    whole: WholeModel,
    most: float,
    search: Callable[[float], Allocation],
    device: str,
) -> tuple[Allocation, float, float]:
    """Search designs with which the whole model reaches the target; a second time where the first ones miss it, or pass it.

    Args:
        model: gives the dense model, which is let go after every measurement.
        limit: the budget.
        whole: times of the dense model.
        most: the largest speed-up that can be reached.
        search: finds designs whose layers take at most so many seconds together.
        device: where.

    Returns:
        The designs, the speed-up that their times predict, and the one that was measured.

    Raises:
        OptionError: when the time that is left is too little for any designs.
    """
    wanted = limit.budget.speedup
    assert wanted is not None
    aim = aimed(wanted, most)
    allocation = search(whole.allowed(aim))
    measured = _measured(model, allocation, limit, device)
    if not MISSED * wanted <= measured <= BEYOND * wanted:
        # the one that says less against the first choice
        nearer = max if measured < wanted else min
        measured = nearer(measured, _measured(model, allocation, limit, device))
    if measured < MISSED * wanted:
        allocation = search(whole.allowed(min(aim * min(wanted / measured, TIGHTENING), most)))
        measured = _measured(model, allocation, limit, device)
    elif measured > BEYOND * wanted:
        # at least half of what was asked for
        least = max(aim * max(AIM * wanted / measured, 1 / TIGHTENING), (1 + wanted) / 2)
        for loosened in (least, (least + aim) / 2):
            looser = search(whole.allowed(loosened))
            again = _measured(model, looser, limit, device)
            if again >= wanted:
                allocation, measured = looser, again
                break
    return allocation, whole.speedup(allocation.choice.cost / 1e9), measured


def _measured(model: Callable[[], Any], allocation: Allocation, limit: Limit, device: str) -> float:
    """How much faster the model is with fresh layers of the chosen designs."""
    dense = model()
    fresh = with_fresh_layers(dense, allocation.plan)
    times = forward_seconds({"dense": as_it_runs(dense), "converted": fresh}, limit.budget, device)
    return times["dense"] / times["converted"]
