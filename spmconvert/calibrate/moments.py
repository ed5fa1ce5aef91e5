"""What calibration rows say about layers, gathered together: input moments on each part of the rows, and output metrics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmconvert.calibrate.curvature import gather_curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.data.calibration import CalibrationRows
from spmconvert.model.loading import in_float32
from spmconvert.plan.plan import LayerPlan


@dataclass(frozen=True)
class Moments:
    """What calibration rows say about one layer.

    Attributes:
        fitted: moments of its inputs on the rows that are fitted.
        measured: the same on the rows that errors are measured on: held out, or there to choose designs.
        metric: what errors of its outputs cost, where that was asked for.
    """

    fitted: ActivationStatistics
    measured: ActivationStatistics
    metric: OutputMetric | None = None

    @classmethod
    def isotropic(cls, in_features: int) -> "Moments":
        """What stands in for data when there is none."""
        moments = ActivationStatistics.isotropic(in_features)
        return cls(moments, moments)

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        metric = None if self.metric is None else self.metric.to(device)
        return Moments(self.fitted.to(device), self.measured.to(device), metric)


def gather_moments(
    model: Any,
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    report: Callable[[int, int], None],
    *,
    choosing: bool = False,
    weighted: bool = False,
    seed: int = 0,
) -> dict[str, Moments]:
    """Run the calibration rows through the model and return the moments of the layers by name.

    Args:
        model: the dense model.
        layers: whose inputs are wanted.
        rows: of the calibration text.
        report: told how many batches are through, and of how many.
        choosing: measure on the rows that choose designs, in place of the held-out ones.
        weighted: measure what errors of the outputs cost, too; takes a backward pass over the fitted rows.
        seed: seed of that measurement.
    """
    names = [layer.target.name for layer in layers]
    measuring_rows = rows.choosing if choosing else rows.held_out
    fitted_batches, measuring_batches = (-(-len(part) // rows.batch_size) for part in (rows.fitted, measuring_rows))
    total = (2 if weighted else 1) * fitted_batches + measuring_batches
    done = 0

    def counted(part: list[Tensor]) -> Iterator[dict[str, Any]]:
        nonlocal done
        for batch in rows.batches(part, model):
            yield batch
            done += 1
            report(done, total)

    fitted = collect(model, names, counted(rows.fitted))
    measured = collect(model, names, counted(measuring_rows))
    curvatures = {}
    if weighted:
        # gradients of a model in half precision round to nothing where they are small
        with in_float32(model):
            curvatures = gather_curvatures(model, names, counted(rows.fitted), seed)
    metrics = {name: OutputMetric.of(curvature) for name, curvature in curvatures.items()}
    return {name: Moments(fitted[name], measured[name], metrics.get(name)) for name in names}
