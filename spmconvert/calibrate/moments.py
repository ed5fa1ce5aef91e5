"""What calibration rows say about layers: input moments on each part of the rows, output metrics, and where they are kept.

One run over the rows serves everything that asks for moments: curves, designs and final fits. They are written to a folder
a layer at a time, so that a resumed run takes the same numbers, and only the layer at work is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmconvert.calibrate.curvature import Curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.data.calibration import CalibrationRows
from spmconvert.model.loading import in_float32
from spmconvert.outputs.objective import objective_for
from spmconvert.plan.plan import LayerPlan, statistics_bytes, statistics_groups
from spmconvert.system.files import save_whole

PARTS = ("fitted", "choosing", "held_out")
# tokens of a backward pass: what it keeps of every layer is the largest thing in memory
GRADIENT_TOKENS = 256
# positions that weigh outputs where each has a word or class of its own; with one probe a row, all rows do
WEIGHING_POSITIONS = 8192


@dataclass(frozen=True)
class Moments:
    """What calibration rows say about one layer.

    Attributes:
        fitted: moments of its inputs on the rows that are fitted.
        held_out: the same on the rows that errors are measured on.
        choosing: the same on the rows that choose designs, None where the recipe names them.
        metric: what errors of its outputs cost, where that was asked for.
    """

    fitted: ActivationStatistics
    held_out: ActivationStatistics
    choosing: ActivationStatistics | None = None
    metric: OutputMetric | None = None

    @classmethod
    def isotropic(cls, in_features: int) -> "Moments":
        """What stands in for data when there is none."""
        moments = ActivationStatistics.isotropic(in_features)
        return cls(moments, moments, moments)

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        choosing = None if self.choosing is None else self.choosing.to(device)
        metric = None if self.metric is None else self.metric.to(device)
        return Moments(self.fitted.to(device), self.held_out.to(device), choosing, metric)


def moment_bytes(layers: Sequence[LayerPlan]) -> int:
    """Disk space that the moments of layers take."""
    return sum(len(PARTS) * statistics_bytes(layer.target.in_features) for layer in layers)


class MomentStore:
    """A folder with the moments of every layer.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return self._file(name, "fitted").exists()

    def read(self, name: str) -> Moments:
        """The moments of a layer that was gathered."""
        statistics = {part: self._part(name, part) for part in PARTS}
        fitted, held_out = statistics["fitted"], statistics["held_out"]
        assert fitted is not None
        assert held_out is not None
        return Moments(fitted[0], held_out[0], statistics["choosing"] and statistics["choosing"][0], fitted[1])

    def write(self, name: str, part: str, statistics: ActivationStatistics, metric: OutputMetric | None = None) -> None:
        """Keep one part of a layer's moments; the fitted one comes last."""
        tensors = {"rows": torch.tensor(statistics.rows), "mean": statistics.mean, "scatter": statistics.scatter}
        if metric is not None:
            tensors |= {"vectors": metric.vectors, "values": metric.values}
            tensors["level"] = torch.tensor(metric.level, dtype=torch.float64)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_whole(self._file(name, part), lambda temporary: save_file(contiguous, temporary))

    def _part(self, name: str, part: str) -> tuple[ActivationStatistics, OutputMetric | None] | None:
        file = self._file(name, part)
        if not file.exists():
            return None
        found = load_file(file)
        metric = None
        if "vectors" in found:
            metric = OutputMetric(found["vectors"], found["values"], found["level"].item())
        return ActivationStatistics(int(found["rows"]), found["mean"], found["scatter"]), metric

    def _file(self, name: str, part: str) -> Path:
        return self._folder / f"{sha256(name.encode()).hexdigest()[:32]}.{part}.safetensors"


def gather_moments(
    model: Callable[[], Any],
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    store: MomentStore,
    report: Callable[[int, int], None],
    *,
    weighted: bool = False,
    seed: int = 0,
) -> None:
    """Run the calibration rows through the model and keep the moments of all layers that are not kept yet.

    Args:
        model: gives the dense model, where anything is missing.
        layers: whose inputs are wanted.
        rows: of the calibration text.
        store: where moments are kept.
        report: told how many rows are through, and of how many.
        weighted: measure what errors of the outputs cost, too; takes a backward pass over the fitted rows.
        seed: seed of that measurement.
    """
    groups = [
        [layer.target.name for layer in group]
        for group in statistics_groups(layers, weighted=weighted)
        if any(layer.target.name not in store for layer in group)
    ]
    total = len(groups) * sum(len(getattr(rows, part)) for part in PARTS)
    done = 0

    def counted(part: list[Tensor], size: int) -> Iterator[dict[str, Any]]:
        nonlocal done
        for first in range(0, len(part), size):
            yield next(rows.batches(part[first : first + size], model()))
            done += len(part[first : first + size])
            report(done, total)

    for names in groups:
        for part in ("choosing", "held_out"):
            drawn = getattr(rows, part)
            if drawn:
                for name, statistics in collect(model(), names, counted(drawn, rows.batch_size)).items():
                    store.write(name, part, statistics)
        for name, statistics, metric in _fitted(model(), names, rows, counted, weighted=weighted, seed=seed):
            store.write(name, "fitted", statistics, metric)


def _fitted(
    model: Any,
    names: Sequence[str],
    rows: CalibrationRows,
    counted: Callable[[list[Tensor], int], Iterator[dict[str, Any]]],
    *,
    weighted: bool,
    seed: int,
) -> Iterator[tuple[str, ActivationStatistics, OutputMetric | None]]:
    """Moments on the fitted rows, with metrics from the same run."""
    if not weighted:
        for name, statistics in collect(model, names, counted(rows.fitted, rows.batch_size)).items():
            yield name, statistics, None
        return
    longest = max(len(row) for row in rows.fitted)
    size = min(rows.batch_size, max(1, GRADIENT_TOKENS // longest))
    weighing = len(rows.fitted)
    if objective_for(model.config, type(model).__name__) == "logits":
        weighing = min(weighing, max(1, WEIGHING_POSITIONS // longest))
    # gradients of a model in half precision round to nothing where they are small
    with in_float32(model):
        curvatures = Curvatures(model, names, seed)
        curvatures.look_at(next(rows.batches(rows.fitted[:1], model)))
        gathered = collect(model, names, counted(rows.fitted[:weighing], size), curvatures.add)
        found = curvatures.result()
    if others := rows.fitted[weighing:]:
        for name, statistics in collect(model, names, counted(others, rows.batch_size)).items():
            gathered[name].merge_(statistics)
    for name in names:
        yield name, gathered.pop(name), OutputMetric.of(found.pop(name))
