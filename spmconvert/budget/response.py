"""What a whole model loses when a single layer is replaced: measured at two sizes, interpolated between them.

A curvature tells output directions of one layer apart, but is blind to what comes after second order, and the clipping of
gradients hides part of the rest: the measured divergence is 1.4 to 15 times the predicted one, most where errors are
largest. Two candidates of a layer are therefore put into the model, one at a time, and predictions are scaled by what is
found; with low rank alone that takes a small Llama from 5.83 to 5.36 nats at 10 % of the MLP parameters.

Predictions for encoders are left as they are: errors in several blocks do not add up there, and scaled predictions are
worse. Both are tabled in docs/results.md.

What it gives up: errors of several layers at once, which cost more than their sum; a forward pass of both models for each
candidate. In a model of many layers only a part of each role is measured, and the others lie between.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from spmconvert.errors import CalibrationError
from spmconvert.model.chain import Chain, Walk
from spmconvert.model.states import STATES_LIMIT, States
from spmconvert.model.swap import copy_sharing_tensors, replace_module
from spmconvert.outputs.losses import class_loss
from spmconvert.outputs.objective import class_logits, first_states, objective_for, pooled, real_positions
from spmconvert.outputs.words import compare_words, has_plain_head, word_head, word_states

# shares of a layer's parameters that its low-rank candidates keep
MEASURED_SHARES = (0.04, 0.3)
# rows of 128 tokens determine a divergence to several per cent
MEASURED_ROWS = 8
# layers that are measured; responses of one role change smoothly over the depth
MOST_MEASURED = 24
_LEAST = 1e-12


@dataclass(frozen=True)
class Response:
    """Pairs of predicted and measured losses of one layer's candidates.

    Attributes:
        points: (predicted, measured), the smaller prediction first.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> "Response":
        """Sort what was measured; differences that rounding hides count as tiny."""
        return cls(tuple(sorted((max(a, _LEAST), max(b, _LEAST)) for a, b in points)))

    def mixed(self, other: "Response", share: float) -> "Response":
        """Geometric mean of the points of two responses, ``share`` of the other's."""
        pairs = zip(self.points, other.points, strict=True)
        return Response(
            tuple(
                (
                    math.exp((1 - share) * math.log(a) + share * math.log(c)),
                    math.exp((1 - share) * math.log(b) + share * math.log(d)),
                )
                for (a, b), (c, d) in pairs
            )
        )

    def loss(self, predicted: float) -> float:
        """The prediction times a factor that is interpolated on logarithmic scales and constant outside."""
        (low, measured_low), (high, measured_high) = self.points[0], self.points[-1]
        first, last = math.log(measured_low / low), math.log(measured_high / high)
        span = math.log(high / low)
        position = 0.0 if span == 0 else math.log(max(predicted, _LEAST) / low) / span
        return predicted * math.exp(first + min(max(position, 0.0), 1.0) * (last - first))


class Comparison:
    """How far what a changed model puts out is from what it did before, in the unit of its layers' curvature.

    Args:
        model: the dense model.
        batch: keyword arguments of it, to find out how words follow from states.
    """

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        self._model = model
        self._objective = objective_for(model.config, type(model).__name__)
        self._plain_head = self._objective == "logits" and has_plain_head(model, batch)

    def output(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """What is compared, [positions, ...]."""
        if self._objective == "logits":
            return real_positions(word_states(model, model, batch, plain_head=self._plain_head)[0], batch)
        output = model(**batch)
        if self._objective == "hidden":
            return normalize(pooled(first_states(output), batch).float(), dim=-1)
        return class_logits(output, batch)

    def distance(self, student: Any, found: Tensor, target: Tensor) -> Tensor:
        """Of two outputs, summed over positions."""
        if self._objective == "logits":
            head, target_head = (word_head(model, plain_head=self._plain_head) for model in (student, self._model))
            return compare_words(found, head, (target,), target_head)[0]
        if self._objective == "hidden":
            return (found - target).square().sum()
        return class_loss(found, target, scores=self._objective == "scores")


class Divergences:
    """Mean divergence of a model's output when one layer is replaced, in the unit of its curvature.

    Args:
        model: the dense model, which is left alone.
        batches: keyword arguments of the model; what it puts out for them is computed once.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batches: Sequence[dict[str, Any]]) -> None:
        self._model, self._batches = model, batches
        self._comparison = Comparison(model, batches[0])
        self._targets = [self._comparison.output(model, batch) for batch in batches]

    @torch.no_grad()
    def of(self, name: str, replacement: nn.Module) -> float:
        """With ``replacement`` in the place of the layer.

        Returns:
            KL a word or class; for an encoder the squared distance of a row's mean hidden state at unit length.

        Raises:
            CalibrationError: when it is not finite.
        """
        student = copy_sharing_tensors(self._model)
        replace_module(student, name, replacement.to(self._model.dtype).eval())
        found = (self._comparison.output(student, batch) for batch in self._batches)
        return _mean_distance(name, self._comparison, student, zip(found, self._targets, strict=True))


@torch.no_grad()
def divergences_by_block(
    chain: Chain,
    batches: Sequence[dict[str, Any]],
    names: Sequence[str],
    replacements: Callable[[str], Iterable[nn.Module]],
) -> dict[str, list[float]]:
    """The same for many replacements, one at a time each, in one walk through the blocks.

    Args:
        chain: the dense model, which is left alone.
        batches: keyword arguments of the model.
        names: of layers in the chain.
        replacements: what takes a layer's place, in the order of the blocks asked for once a layer.

    Returns:
        By name the divergences, as ``Divergences.of`` gives them, in the order of the replacements.

    Raises:
        CalibrationError: when one is not finite.
    """
    walk = Walk(chain, batches)
    branches: dict[str, list[States]] = {name: [] for name in names}
    for index in range(len(chain)):
        block, prefix = chain.block(index), f"{chain.name(index)}."
        for states in joined(*branches.values()):
            for batch in range(len(walk)):
                states[batch] = walk.run(block, batch, states[batch])
        for name in (name for name in names if name.startswith(prefix)):
            inside = name.removeprefix(prefix)
            dense = block.get_submodule(inside)
            for replacement in replacements(name):
                replace_module(block, inside, replacement.float().eval())
                changed = [walk.run(block, batch) for batch in range(len(walk))]
                branches[name].append(States(changed, chain.folder, STATES_LIMIT // MOST_MEASURED))
            replace_module(block, inside, dense)
        walk.advance(block)
    with chain.ending_in():
        comparison = Comparison(chain.model, batches[0])

    def outputs(states: States) -> Iterator[Tensor]:
        for batch, state in zip(batches, states, strict=True):
            with chain.ending_in(state):
                yield comparison.output(chain.model, batch)

    targets = list(outputs(walk.states))
    return {
        name: [
            _mean_distance(name, comparison, chain.model, zip(outputs(states), targets, strict=True)) for states in found
        ]
        for name, found in branches.items()
    }


def _mean_distance(name: str, comparison: Comparison, student: Any, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    total = positions = 0.0
    for found, target in pairs:
        total += comparison.distance(student, found, target).item()
        positions += len(found)
    if not math.isfinite(total):
        raise CalibrationError.not_finite(f"outputs of the model with layer {name} replaced", name)
    return total / positions


def measured_sample(names: Sequence[str]) -> list[str]:
    """Layers whose response is measured: all of a few, of many a part that is spread over the depth of every role."""
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(role_of(name), []).append(name)
    share = max(2, MOST_MEASURED // len(roles))
    chosen = set()
    for members in roles.values():
        if len(members) <= share:
            chosen |= set(members)
        else:
            chosen |= {members[round(step * (len(members) - 1) / (share - 1))] for step in range(share)}
    return [name for name in names if name in chosen]


def role_of(name: str) -> str:
    """A layer's name without the numbers in it: the same for one projection in every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def between(names: Sequence[str], measured: Mapping[str, Response]) -> dict[str, Response]:
    """Responses of all layers in their order: measured ones, and between two of a role their factors, by depth."""
    found = dict(measured)
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(role_of(name), []).append(name)
    for members in roles.values():
        known = [index for index, name in enumerate(members) if name in measured]
        for index, name in enumerate(members):
            if name in found:
                continue
            below = max(other for other in known if other < index)
            above = min(other for other in known if other > index)
            share = (index - below) / (above - below)
            found[name] = measured[members[below]].mixed(measured[members[above]], share)
    return {name: found[name] for name in names}
