"""What calibration rows say about each layer, kept in a folder a layer at a time.

A resumed run takes the same numbers, and only the layer at work is in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.model.opening import group_of
from spmconvert.plan.plan import LayerPlan, statistics_bytes
from spmconvert.system.files import save_whole

PARTS = ("fitted", "choosing", "held_out")
# tokens for each feature that moments of experts are drawn towards the others by, and how many times as many own ones make
# that needless
PRIOR, PLENTY = 0.25, 32
# of the fitted rows, while its metric is not known
_PREPARED = "prepared"


@dataclass(frozen=True)
class Moments:
    """What calibration rows say about one layer.

    Attributes:
        fitted: moments of its inputs on the rows that are fitted.
        held_out: the same on the rows that errors are measured on.
        choosing: the same on the rows that choose designs, None where the recipe names them.
        metric: what errors of its outputs cost, where that was asked for.
        tokens: fitted ones that came to it, of an expert that was drawn towards the others; None for any other layer.
    """

    fitted: ActivationStatistics
    held_out: ActivationStatistics
    choosing: ActivationStatistics | None = None
    metric: OutputMetric | None = None
    tokens: int | None = None

    @classmethod
    def isotropic(cls, in_features: int) -> "Moments":
        """What stands in for data when there is none."""
        moments = ActivationStatistics.isotropic(in_features)
        return cls(moments, moments, moments)

    def without_bias(self) -> "Moments":
        """The same for a layer that has none: its fit cannot make up for the mean."""
        return replace(self, fitted=self.fitted.uncentred())

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        choosing = None if self.choosing is None else self.choosing.to(device)
        metric = None if self.metric is None else self.metric.to(device)
        return Moments(self.fitted.to(device), self.held_out.to(device), choosing, metric, self.tokens)

    def drawn_towards(self, pooled: "Moments") -> "Moments":
        """An expert's moments with ``PRIOR`` tokens for each feature more that are like those of all experts of its layer.

        Of parts in which it saw nothing, and where it saw no token, all is theirs.
        """
        prior = max(1, round(PRIOR * len(self.fitted.mean)))
        rows = self.fitted.rows
        if rows > PLENTY * prior:
            return self
        fitted = pooled.fitted.of_rows(prior)
        fitted.merge_(self.fitted)
        metric = self.metric
        if metric is not None and pooled.metric is not None:
            mixed = metric.matrix() + pooled.metric.matrix() * (prior / pooled.fitted.rows)
            # curvatures are sums over the tokens that came, and one that nobody came to is worth a token
            metric = OutputMetric.of(mixed * (max(rows, 1) / (rows + prior)))
        held_out = self.held_out if self.held_out.rows else pooled.held_out
        choosing = self.choosing if self.choosing is None or self.choosing.rows else pooled.choosing
        return Moments(fitted, held_out, choosing, metric, rows)


def moment_bytes(layers: Sequence[LayerPlan]) -> int:
    """Disk space that the moments of layers take."""
    return sum(len(PARTS) * statistics_bytes(layer.target.in_features) for layer in layers)


class MomentStore:
    """A folder with the moments of every layer.

    Args:
        folder: made where it is not there.

    Attributes:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._file(name, "fitted").exists()

    def read(self, name: str) -> Moments:
        """The moments of a layer that was gathered, of an expert with those of the others of its layer."""
        own, group = self.own(name), group_of(name)
        return own if group is None or group not in self else own.drawn_towards(self.own(group))

    def own(self, name: str) -> Moments:
        """The moments of a layer, or of a group of experts, as they were gathered."""
        statistics = {part: self._part(name, part) for part in PARTS}
        fitted, held_out = statistics["fitted"], statistics["held_out"]
        assert fitted is not None
        assert held_out is not None
        return Moments(fitted[0], held_out[0], statistics["choosing"] and statistics["choosing"][0], fitted[1])

    def write(self, name: str, part: str, statistics: ActivationStatistics, metric: OutputMetric | None = None) -> None:
        """Keep one part of a layer's moments; the fitted one comes last."""
        tensors = statistics.tensors
        if metric is not None:
            tensors |= {"vectors": metric.vectors, "values": metric.values}
            tensors["level"] = torch.tensor(metric.level, dtype=torch.float64)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_whole(self._file(name, part), lambda temporary: save_file(contiguous, temporary))

    def prepare(self, name: str, statistics: ActivationStatistics) -> None:
        """Keep what fitted rows say about a layer's inputs until its metric is known."""
        self.write(name, _PREPARED, statistics)

    def finish(self, name: str, metric: OutputMetric) -> None:
        """Keep what was prepared as the fitted part, with a metric."""
        prepared = self._part(name, _PREPARED)
        assert prepared is not None
        self.write(name, "fitted", prepared[0], metric)
        self._file(name, _PREPARED).unlink()

    def _part(self, name: str, part: str) -> tuple[ActivationStatistics, OutputMetric | None] | None:
        file = self._file(name, part)
        if not file.exists():
            return None
        found = load_file(file)
        metric = None
        if "vectors" in found:
            metric = OutputMetric(found["vectors"], found["values"], found["level"].item())
        return ActivationStatistics.from_tensors(found), metric

    def _file(self, name: str, part: str) -> Path:
        return self.folder / f"{sha256(name.encode()).hexdigest()[:32]}.{part}.safetensors"
