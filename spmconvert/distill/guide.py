"""Guidance by the dense layers: a converted layer's output is mixed with its dense original's, less and less.

The output is α·dense + (1 - α)·SPM with α falling to zero on a cosine (self-guided training, StructuredFFN), so that the
layers behind a bad start see good inputs while it improves. It costs the dense product in the steps that are guided, and
gained 0.002 nats where it was measured (docs/results.md), so it is off by default.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Guide:
    """Mixes the dense outputs into the student's converted layers.

    Args:
        student: the converted model.
        teacher: the dense model, on the same device.
        names: converted layers; the same names in both models.
        steps: steps in which α falls from one to zero.

    Attributes:
        alpha: share of the dense output.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Iterable[str], steps: int) -> None:
        self.alpha = 0.0
        self.steps = steps
        for name in names:
            student.get_submodule(name).register_forward_hook(self._mix_with(teacher.get_submodule(name)))

    def set_step(self, step: int) -> None:
        """Choose α for a training step."""
        self.alpha = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if step < self.steps else 0.0

    def _mix_with(self, dense: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def mix(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output if self.alpha == 0 else torch.lerp(output, dense(*inputs).to(output.dtype), self.alpha)

        return mix
