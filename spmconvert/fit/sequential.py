"""Fit layers one after the other on what the converted model feeds them, towards what the dense model puts out.

With x the layer's input in the dense model, z its input in the model that is converted so far, the best matrix on z is the
regression of W x on z. It takes the place of the weight in the ordinary fit, with the moments of z as statistics, so every
structure and the output metric work as they are. A ridge towards W keeps what the calibration rows hardly show; it grows
with the features to each row, since a fixed one is too small for some layers or too large for others.

Where inputs and outputs come from, and what that gives up, is in ``streams``.

Default under a budget, where it is better before a finetune from 10 % of the parameters on (a small GPT-2 at 10 %: 4.595
nats instead of 4.683) and about level after one. Low rank alone is worse with it, so there it is off. All figures, ridges
and the budgets at which it loses: docs/results.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.streams import Streams


@dataclass(frozen=True)
class Regression:
    """What a layer should do with the converted model's activations.

    Attributes:
        weight: regression of the dense outputs on the inputs, [out_features, in_features].
        bias: that makes the mean output exact, [out_features]; None for a layer without a bias.
        inputs: moments of the inputs, uncentred for such a layer.
    """

    weight: Tensor
    bias: Tensor | None
    inputs: ActivationStatistics

    def to(self, device: torch.device | str) -> "Regression":
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Regression(self.weight.to(device), bias, self.inputs.to(device))


class _Paired:
    """Moments of inputs, and of outputs with them; those of outputs alone nobody needs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.inputs = ActivationStatistics.empty(in_features)
        self.mean = torch.zeros(out_features, dtype=torch.float32)
        self.scatter = torch.zeros(out_features, in_features, dtype=torch.float32)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        part, mean = ActivationStatistics.of(inputs), outputs.mean(0)
        self.scatter += ((outputs - mean).t() @ (inputs - part.mean)).cpu()
        part, difference = part.to("cpu"), mean.cpu() - self.mean
        share = part.rows / (self.inputs.rows + part.rows)
        # centred on the means of all rows
        self.scatter.addr_(difference, part.mean - self.inputs.mean, alpha=self.inputs.rows * share)
        self.mean += difference * share
        self.inputs.merge_(part)

    def regression(self, weight: Tensor, *, bias: bool) -> Regression:
        if not bias:
            # of the outputs themselves on the inputs themselves, not of what varies
            self.scatter.addr_(self.mean, self.inputs.mean, alpha=self.inputs.rows)
            self.inputs = self.inputs.uncentred()
        covariance = self.inputs.covariance.double()
        if not covariance.any():
            # constant inputs say nothing about the weight
            return self._with_bias(weight, bias=bias)
        # of the mean variance: as noise of the moments grows, with unknowns to each row
        ridge = len(covariance) / self.inputs.rows * covariance.diagonal().mean()
        cross = self.scatter.double() / self.inputs.rows + ridge * weight.double()
        covariance.diagonal().add_(ridge)
        regressed = torch.linalg.solve(covariance, cross.t()).t().float()
        return self._with_bias(regressed, bias=bias)

    def _with_bias(self, weight: Tensor, *, bias: bool) -> Regression:
        return Regression(weight, self.mean - weight @ self.inputs.mean if bias else None, self.inputs)


def regress(streams: Streams, name: str, weight: Tensor, *, bias: bool) -> Regression:
    """The regression of a layer in the block at work; all layers before it are converted.

    Args:
        streams: that have come to its block.
        name: of the layer.
        weight: its dense weight, [out_features, in_features], float32.
        bias: whether the converted layer has one.
    """
    out_features, in_features = weight.shape
    sums = _Paired(in_features, out_features)
    for inputs, outputs in streams.pairs(name):
        sums.add(inputs, outputs)
    return sums.regression(weight, bias=bias)
