"""Magnitude 2:4: two of four weights, which stay the same two while the others are trained."""

import torch

from benchmarks.common import Layer
from spmconvert.reporting.baselines import SparseLinear, keep_two_of_four


class MaskedLinear(SparseLinear):
    """A sparse weight whose zeros stay zeros in a finetune."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.register_buffer("mask", weight != 0, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        return torch.nn.functional.linear(x, self.weight * self.mask, self.bias)


def sparse(layer: Layer) -> MaskedLinear:
    """Two of four weights by magnitude, whatever the budget, with the bias corrected."""
    kept = keep_two_of_four(layer.weight)
    return MaskedLinear(kept, layer.bias + (layer.weight - kept) @ layer.fitted.mean)
