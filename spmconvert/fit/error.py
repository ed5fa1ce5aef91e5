"""How far a replacement is from a dense layer, from the moments of the inputs alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spmconvert.calibrate.statistics import ActivationStatistics


@dataclass(frozen=True)
class LayerError:
    """How far a replacement is from the dense layer on some rows.

    Attributes:
        relative: E‖y - ŷ‖² / E‖y‖².
        centred: E‖y - ŷ‖² / E‖y - E y‖².
    """

    relative: float
    centred: float


@torch.no_grad()
def measure_error(
    dense: tuple[Tensor, Tensor | None], replacement: tuple[Tensor, Tensor | None], statistics: ActivationStatistics
) -> LayerError:
    """Error of a replacement's (weight, bias) against a dense layer's, on the rows behind the statistics."""
    mean, covariance = statistics.mean.double(), statistics.covariance.double()

    def affine(layer: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        weight = layer[0].double()
        offset = weight @ mean
        return weight, offset if layer[1] is None else offset + layer[1].double()

    weight, output_mean = affine(dense)
    other, other_mean = affine(replacement)
    difference = weight - other
    # rounding of moments may leave less than nothing
    missed = (difference @ covariance * difference).sum().clamp_min(0) + (output_mean - other_mean).square().sum()
    varying = (weight @ covariance * weight).sum()
    total = varying + output_mean.square().sum()
    return LayerError((missed / total.clamp_min(1e-300)).item(), (missed / varying.clamp_min(1e-300)).item())
