"""What a whole model loses when a single layer is replaced: measured at two sizes, interpolated between them.

A curvature tells output directions of one layer apart, but is blind to what comes after second order, and the clipping of
gradients hides part of the rest: the measured divergence is 1.4 to 15 times the predicted one, most where errors are
largest. Two candidates of a layer are therefore put into the model, one at a time, and predictions are scaled by what is
found; with low rank alone that takes a small Llama from 5.83 to 5.36 nats at 10 % of the MLP parameters.

Predictions for encoders are left as they are: errors in several blocks do not add up there, and scaled predictions are
worse. Both are tabled in benchmarks/results/choices.md.

What it gives up: errors of several layers at once, which cost more than their sum; a forward pass of both models for each
candidate.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from spmconvert.errors import CalibrationError
from spmconvert.model.swap import copy_sharing_tensors, replace_module
from spmconvert.outputs.losses import class_loss
from spmconvert.outputs.objective import Objective, class_logits, objective_for, pooled, real_positions
from spmconvert.outputs.words import compare_words, has_plain_head, word_head, word_states

# shares of a layer's parameters that its low-rank candidates keep
MEASURED_SHARES = (0.04, 0.3)
# rows of 128 tokens determine a divergence to a few per cent
MEASURED_ROWS = 16
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

    def loss(self, predicted: float) -> float:
        """The prediction times a factor that is interpolated on logarithmic scales and constant outside."""
        (low, measured_low), (high, measured_high) = self.points[0], self.points[-1]
        first, last = math.log(measured_low / low), math.log(measured_high / high)
        span = math.log(high / low)
        position = 0.0 if span == 0 else math.log(max(predicted, _LEAST) / low) / span
        return predicted * math.exp(first + min(max(position, 0.0), 1.0) * (last - first))


@torch.no_grad()
def divergence(model: Any, name: str, replacement: nn.Module, batches: Iterable[dict[str, Any]]) -> float:
    """Mean divergence of a model's output, in the unit of its curvature, when one layer is replaced.

    Args:
        model: the dense model, which is left alone.
        name: the layer.
        replacement: what takes its place.
        batches: keyword arguments of the model.

    Returns:
        KL a word or class; for an encoder the squared distance of a row's mean hidden state at unit length.

    Raises:
        CalibrationError: when it is not finite.
    """
    student = copy_sharing_tensors(model)
    replace_module(student, name, replacement.eval())
    objective = objective_for(model.config, type(model).__name__)
    total = positions = 0.0
    plain_head: bool | None = None
    for batch in batches:
        if objective == "logits" and plain_head is None:
            plain_head = has_plain_head(model, batch)
        loss, count = _distance(student, model, objective, batch, plain_head=bool(plain_head))
        total, positions = total + loss.item(), positions + count
    if not math.isfinite(total):
        raise CalibrationError.not_finite(f"outputs of the model with layer {name} replaced", name)
    return total / positions


def _distance(
    student: Any, teacher: Any, objective: Objective, batch: dict[str, Any], *, plain_head: bool
) -> tuple[Tensor, int]:
    """The sum over the positions of a batch, and their number."""
    if objective == "logits":
        both = [word_states(model, model, batch, plain_head=plain_head)[0] for model in (student, teacher)]
        states, targets = (real_positions(model_states, batch) for model_states in both)
        head, target_head = (word_head(model, plain_head=plain_head) for model in (student, teacher))
        return compare_words(states, head, (targets,), target_head)[0], len(states)
    outputs = [model(**batch) for model in (student, teacher)]
    if objective == "hidden":
        vectors, target_vectors = (normalize(pooled(output[0], batch).float(), dim=-1) for output in outputs)
        return (vectors - target_vectors).square().sum(), len(vectors)
    logits, target_logits = (class_logits(output, batch) for output in outputs)
    return class_loss(logits, target_logits, scores=objective == "scores"), len(logits)
