"""How long a layer takes on this machine: measured beside the dense layer of its size, kept for every later conversion.

What a layer costs is its measured time, never its FLOPs. Every design is timed in turn with ``nn.Linear`` in one run, and
its time is the ratio times the dense layer's, so that a machine that is slow for a moment is slow for both. For few tokens,
where a layer is as fast as its weights come from memory, several copies are called in turn, as a model's layers are. Low
rank is timed at a few ranks and interpolated between them. Times are kept by device, threads, dtype and number of tokens.
"""

import itertools
import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import ALIGNED, LowRank
from spmconvert.system.caches import cache_directory, keep
from spmconvert.system.parsing import parse_json
from spmconvert.system.timing import device_name, interleaved_seconds

# changes with anything that changes how long a design takes
TIMES_VERSION = 1
SECONDS = 0.1
# shares of the full rank at which low rank is timed
TIMED_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)
# ranks beside other terms are timed in steps of it
COARSE = 16
# below so many tokens a layer waits for its weights: copies of this size together are called in turn
FEW_TOKENS, COPIED_BYTES, MOST_COPIES = 64, 1 << 25, 8
# a layer counts as slower than the dense one beyond what two runs of the same product differ by
TIE = 0.03


@dataclass
class TimeTable:
    """Times of layers for one number of tokens on one device.

    Attributes:
        tokens: rows that go through a layer at once.
        device: where.
        dtype: of weights and activations.
    """

    tokens: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _file: Path = field(default=Path(), init=False, repr=False)
    _others: dict[int, "TimeTable"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Read what earlier runs measured."""
        decides = f"{TIMES_VERSION}:{torch.__version__}:{device_name(self.device)}:{self.dtype}:{self.tokens}"
        self._file = cache_directory("times") / f"{sha256(decides.encode()).hexdigest()[:32]}.json"
        try:
            found = parse_json(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        # a file that was damaged has to be measured again
        whole = isinstance(found, dict) and all(isinstance(time, float) and 0 < time < math.inf for time in found.values())
        self._known = found if whole else {}

    def at(self, tokens: int) -> "TimeTable":
        """Times for another number of tokens."""
        if tokens == self.tokens:
            return self
        if tokens not in self._others:
            self._others[tokens] = TimeTable(tokens, self.device, self.dtype)
        return self._others[tokens]

    def dense(self, in_features: int, out_features: int) -> float:
        """Seconds of the dense layer."""
        key = f"dense {in_features} {out_features}"
        if key not in self._known:
            calls = {"dense": self._dense_call(in_features, out_features)}
            self._keep(key, statistics.median(self._timed(calls)["dense"]))
        return self._known[key]

    def seconds(self, design: Design) -> float:
        """Seconds of a design."""
        low_rank = design.term("lowrank")
        if design.runs_dense and self.device == "cpu":
            # the same product, so a difference would be noise
            return self.dense(design.in_features, design.out_features)
        if design.only_low_rank and isinstance(low_rank, LowRank):
            return self._interpolated(low_rank)
        if isinstance(low_rank, LowRank):
            # ranks beside other terms are many, and neighbours take the same time
            rank = min(-(-low_rank.rank // COARSE) * COARSE, design.in_features, design.out_features)
            others = tuple(term for term in design.terms if term is not low_rank)
            design = Design(design.in_features, design.out_features, (*others, self._low_rank(low_rank, rank)))
        return self._measured(design)

    def is_slower(self, design: Design) -> bool:
        """Whether a design takes longer than the dense layer."""
        return self.seconds(design) > (1 + TIE) * self.dense(design.in_features, design.out_features)

    def keep_model(self, model: str, rows: int, dense: float, rest: float) -> None:
        """Keep the times of a whole dense model's forward pass, and of it without targeted layers, for dry runs.

        Args:
            model: name of both together.
            rows: of tokens.
            dense: seconds of the one.
            rest: seconds of the other.
        """
        self._known[f"rest {model} {rows}"] = rest
        self._keep(f"model {model} {rows}", dense)

    def of_model(self, model: str, rows: int) -> tuple[float, float] | None:
        """These times, or None where no run has measured them."""
        dense, rest = (self._known.get(f"{part} {model} {rows}") for part in ("model", "rest"))
        return None if dense is None or rest is None else (dense, rest)

    def _interpolated(self, term: LowRank) -> float:
        ranks = timed_ranks(term.in_features, term.out_features)
        above = min(bisect_left(ranks, term.rank), len(ranks) - 1)
        below = max(above - 1, 0)
        low, high = (
            self._measured(Design(term.in_features, term.out_features, (self._low_rank(term, rank),)))
            for rank in (ranks[below], ranks[above])
        )
        span = ranks[above] - ranks[below]
        position = min(max((term.rank - ranks[below]) / span, 0.0), 1.0) if span else 0.0
        return low + position * (high - low)

    @staticmethod
    def _low_rank(term: LowRank, rank: int) -> LowRank:
        return LowRank(term.in_features, term.out_features, rank)

    def _measured(self, design: Design) -> float:
        key = f"{design.in_features} {design.out_features} {json.dumps(design.to_json(), sort_keys=True)}"
        if key not in self._known:
            sizes = (design.in_features, design.out_features)
            calls = {"dense": self._dense_call(*sizes), "design": self._design_call(design)}
            times = {name: statistics.median(values) for name, values in self._timed(calls).items()}
            self._keep(key, self.dense(*sizes) * times["design"] / times["dense"])
        return self._known[key]

    def _timed(self, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        return interleaved_seconds(calls, SECONDS, self.device)

    def _dense_call(self, in_features: int, out_features: int) -> Callable[[], Any]:
        def build() -> nn.Module:
            return nn.Linear(in_features, out_features, device=self.device, dtype=self.dtype)

        return self._call(build, in_features, in_features * out_features)

    def _design_call(self, design: Design) -> Callable[[], Any]:
        def build() -> nn.Module:
            sizes = (design.in_features, design.out_features)
            return SPMLinear(*sizes, terms=design.terms, device=self.device, dtype=self.dtype)

        return self._call(build, design.in_features, design.in_features * design.out_features)

    def _call(self, build: Callable[[], nn.Module], in_features: int, weights: int) -> Callable[[], Tensor]:
        copies = 1
        if self.tokens < FEW_TOKENS:
            copies = min(MOST_COPIES, max(1, COPIED_BYTES // (weights * self.dtype.itemsize)))
        layers = itertools.cycle([build().eval().requires_grad_(False) for _ in range(copies)])
        x = torch.randn(1, self.tokens, in_features, device=self.device, dtype=self.dtype)

        def call() -> Tensor:
            with torch.no_grad():
                y: Tensor = next(layers)(x)
            return y

        return call

    def _keep(self, key: str, seconds: float) -> None:
        self._known[key] = seconds
        keep(self._file, json.dumps(self._known))


def timed_ranks(in_features: int, out_features: int) -> list[int]:
    """Ranks at which low rank is timed, in order: aligned shares of the full one."""
    full = min(in_features, out_features)
    ranks = {max(1, round(share * full)) for share in TIMED_SHARES}
    return sorted({rank - rank % ALIGNED if rank > ALIGNED else rank for rank in ranks})
