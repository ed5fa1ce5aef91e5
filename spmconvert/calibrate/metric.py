"""What errors of a layer's output cost the model, direction by direction.

The second-order change of a loss when a layer's matrix is wrong by D is trace(C D Σ Dᵀ), with Σ the second moment of the
inputs and C the curvature: half of the second moment of the loss's gradient with respect to the output (the Fisher matrix
where labels are drawn from the model itself; inputs and gradients are taken as independent, as in K-FAC, Martens and
Grosse 2015). A few directions carry most of C, so it is kept as its largest eigenpairs and one level for all others. That
makes a weighted fit cost two thin products more than a plain one; a few hundred calibration rows do not determine the
small eigenvalues anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = 128
# least level of the other directions, as a share of the mean of all: no direction is free because few rows never saw it
DAMPING = 0.1
_ITERATIONS = 8


@dataclass(frozen=True)
class OutputMetric:
    """The curvature as vectors · diag(values) · vectorsᵀ on some directions and ``level`` on all others.

    Attributes:
        vectors: orthonormal directions, [out_features, directions], float32.
        values: curvature along each, [directions].
        level: curvature along all other directions.
    """

    vectors: Tensor
    values: Tensor
    level: float

    @classmethod
    def of(cls, curvature: Tensor) -> "OutputMetric":
        """Reduce a curvature [out_features, out_features], positive semi-definite and not zero."""
        size = len(curvature)
        directions = min(DIRECTIONS, size)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(size, directions, generator=generator, dtype=torch.float32).to(curvature.device)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(curvature @ basis)[0]
        values, rotation = torch.linalg.eigh(basis.t() @ curvature @ basis)
        trace = curvature.diagonal().sum()
        rest = ((trace - values.sum()) / (size - directions)).clamp_min(0).item() if directions < size else 0.0
        level = max(rest, DAMPING * trace.item() / size)
        return cls(basis @ rotation, values.clamp_min(level), level)

    def to(self, device: torch.device | str) -> "OutputMetric":
        """The same on another device."""
        return OutputMetric(self.vectors.to(device), self.values.to(device), self.level)

    def matrix(self) -> Tensor:
        """The curvature as it was kept, [out_features, out_features]."""
        curvature = (self.vectors * (self.values - self.level)) @ self.vectors.t()
        curvature.diagonal().add_(self.level)
        return curvature

    def energy(self, outputs: Tensor) -> Tensor:
        """Sum over rows of yᵀ C y for outputs [rows, out_features]; differentiable."""
        along = (outputs @ self.vectors).square() @ (self.values - self.level)
        return self.level * outputs.square().sum() + along.sum()

    def root(self, outputs: Tensor) -> Tensor:
        """Rows times C^(1/2): [rows, out_features]."""
        return self._power(outputs, 0.5)

    def times(self, outputs: Tensor) -> Tensor:
        """Rows times C: [rows, out_features]."""
        return self._power(outputs, 1.0)

    def inverse_root(self, outputs: Tensor) -> Tensor:
        """Rows times C^(-1/2): [rows, out_features]."""
        return self._power(outputs, -0.5)

    def _power(self, outputs: Tensor, exponent: float) -> Tensor:
        other = self.level**exponent
        return other * outputs + (outputs @ self.vectors * (self.values**exponent - other)) @ self.vectors.t()


class StackedRoots:
    """C^(1/2) of several metrics with as many directions each, for as many layers at once."""

    def __init__(self, metrics: Sequence[OutputMetric]) -> None:
        self._vectors = torch.stack([metric.vectors for metric in metrics])
        levels = [metric.level**0.5 for metric in metrics]
        self._gains = torch.stack(
            [metric.values**0.5 - level for metric, level in zip(metrics, levels, strict=True)]
        ).unsqueeze(1)
        self._levels = self._gains.new_tensor(levels).view(-1, 1, 1)

    def of(self, outputs: Tensor) -> Tensor:
        """Rows times each layer's C^(1/2): [layers, rows, out_features]."""
        return self._levels * outputs + (outputs @ self._vectors * self._gains) @ self._vectors.mT
