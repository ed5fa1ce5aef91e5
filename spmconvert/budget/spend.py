"""Spend a budget: from calibration moments to the designs of all layers.

Everything that a choice needs is brought together here: curves of earlier runs, low rank at every rank, how the model
responds to errors, times of layers and of the whole model, and the search.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

from pydantic import TypeAdapter
from torch import Tensor, nn
from typing_extensions import TypedDict

from spmconvert.budget.allocation import Allocation, Limit, allocate, budget_row, check_reachable, smallest_designs
from spmconvert.budget.batches import waves_of
from spmconvert.budget.cache import RESPONSE, CacheIdentity, CurveCache, write_part
from spmconvert.budget.candidates import Subject
from spmconvert.budget.curves import (
    Curves,
    check_measurable,
    known_curves,
    measure_low_rank,
    measure_terms,
    measure_terms_together,
    spread_responses,
)
from spmconvert.budget.hopeless import hopeless
from spmconvert.budget.response import (
    MEASURED_ROWS,
    MEASURED_SHARES,
    Divergences,
    divergences_by_block,
    measured_sample,
)
from spmconvert.budget.search import Search, Trial
from spmconvert.budget.speed import WholeModel, aimed, check_speedup, search_for_speed, time_whole_model, whole_model
from spmconvert.budget.times import TimeTable
from spmconvert.calibrate.store import Moments
from spmconvert.checkpoint.places import CHOICE_FILE
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.calibration import CalibrationRows
from spmconvert.errors import CorruptCheckpointError, OptionError
from spmconvert.fit.batches import may_batch
from spmconvert.model.chain import Chain
from spmconvert.operator.design import Design
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.outputs.objective import Objective
from spmconvert.plan.plan import ConversionPlan, LayerPlan
from spmconvert.recipe.recipe import Budget, Recipe
from spmconvert.system.caches import check_cache
from spmconvert.system.parsing import parse_json
from spmconvert.system.team import ALONE, Team


class Watch(Protocol):
    """Who is told how it gets on."""

    def losing(self, warning: str) -> None:
        """A budget is predicted to lose more than a finetune wins back."""

    def measured(self, name: str, done: int, total: int) -> None:
        """A layer's candidates are there."""


@dataclass(frozen=True)
class Spending:
    """What designs are chosen from.

    Attributes:
        source: the dense checkpoint.
        plan: the targeted layers.
        recipe: with a budget.
        identity: how the model is measured.
        rows: calibration rows, or None without data.
        objective: what the model's outputs are compared by.
        model: gives the dense model, where the whole of it is needed.
        chain: gives its blocks, or None where the layers are in no chain of blocks.
        moments: gives the moments of a layer by name.
        weights: gives weight [out_features, in_features] and bias of a layer, float32.
        device: where.
        watch: told how it gets on.
        team: who measures.
        together: has everybody do a kind of ``work`` on an argument, which is for all of them.
        batch: layers that are fitted together, in place of what ``fit/batches`` finds for the device.
    """

    source: Checkpoint
    plan: ConversionPlan
    recipe: Recipe
    identity: CacheIdentity
    rows: CalibrationRows | None
    objective: Objective
    model: Callable[[], Any]
    chain: Callable[[], Chain | None]
    moments: Callable[[str], Moments | None]
    weights: Callable[[LayerPlan], tuple[Tensor, Tensor | None]]
    device: str
    watch: Watch
    team: Team = ALONE
    together: Callable[[str, Any], None] | None = None
    batch: int | None = None

    @property
    def work(self) -> dict[str, Callable[[Any], None]]:
        """What processes divide: each takes its share of a list, and keeps what it finds in the cache."""
        return {"low rank": self._low_rank, "terms": self._terms, "batches": self._batches, "responses": self._responses}

    def choose(self) -> "Spent":
        """Choose the designs of all layers.

        Raises:
            OptionError: when the budget cannot be kept, or needs calibration rows and has none.
            NotWritableError: when the cache cannot be written.
        """
        budget = self.recipe.budget
        check_measurable(self.recipe)
        check_cache("curves")
        limit = limit_of(budget, self.plan, self.device, self.identity)
        check_reachable(limit)
        timed = None if budget.speedup is None else self._timed(limit)
        text = None if self.rows is None else self.rows.file_sha256
        curves = known_curves(self.source, self.plan, self.recipe, self.identity, text)
        if "lowrank" in budget.structures:
            self._do("low rank", [curve.layer for curve in curves.layers if curve.low_rank is None])
            curves.read_again()
        if RESPONSE in curves.cache.parts:
            self._measure_response(curves)

        def measure(trials: Sequence[Trial]) -> None:
            if may_batch(self.device, self.batch):
                for wave in waves_of(trials, self.device, self.batch):
                    self._do("batches", [[(curve.layer, design) for curve, design in batch] for batch in wave])
            else:
                missing = [(curve.layer, [d for d in designs if not curve.knows(d)]) for curve, designs in trials]
                self._do("terms", [(layer, designs) for layer, designs in missing if designs])
            curves.read_again()

        def search(within: Limit) -> Allocation:
            return Search(curves, within, measure).run()

        if timed is None:
            spent = Spent(search(limit))
        else:
            whole, most = timed

            def search_within(seconds: float) -> Allocation:
                return search(replace(limit, seconds=seconds))

            spent = Spent(*search_for_speed(self.model, limit, whole, most, search_within, self.device))
        loss, limited = spent.allocation.choice.loss, partial(timed_limit, source=self.source)
        found = hopeless(curves, limit, loss, self.objective, limited)
        if found is not None:
            self.watch.losing(found.describe(budget))
        return spent

    def _timed(self, limit: Limit) -> tuple[WholeModel, float]:
        """Times of the dense model, which are kept for runs to come, and the largest speed-up that can be reached.

        Raises:
            OutOfReachError: when that is below the one that is wanted.
        """
        assert limit.times is not None
        whole = time_whole_model(self.model(), limit, self.device)
        limit.times.keep_model(_timed_model(self.source, limit), limit.budget.rows, whole.dense, whole.rest)
        return whole, check_speedup(whole, limit, lambda layer: smallest_designs(layer, limit.budget))

    def _subject(self, layer: LayerPlan) -> Subject:
        weight, bias = self.weights(layer)
        moments = self.moments(layer.target.name) or Moments.isotropic(weight.shape[1])
        moments = moments if layer.spec.bias else moments.without_bias()
        return Subject(weight, bias, moments.to(weight.device), self.recipe)

    def _do(self, kind: str, items: Sequence[Any]) -> None:
        if items and self.together is not None:
            self.together(kind, items)
        elif items:
            self.work[kind](items)

    @property
    def _cache(self) -> CurveCache:
        return CurveCache.of(self.source, self.recipe, self.identity, None if self.rows is None else self.rows.file_sha256)

    def _low_rank(self, layers: Sequence[LayerPlan]) -> None:
        share, cache = self.team.share(layers), self._cache
        for done, layer in enumerate(share, start=1):
            measure_low_rank(cache, self.recipe, layer, self._subject)
            self.watch.measured(layer.target.name, done, len(share))

    def _terms(self, trials: Sequence[tuple[LayerPlan, Sequence[Design]]]) -> None:
        share, cache = self.team.share(trials), self._cache
        for done, (layer, designs) in enumerate(share, start=1):
            measure_terms(cache, layer, designs, self._subject)
            self.watch.measured(layer.target.name, done, len(share))

    def _batches(self, batches: Sequence[Sequence[tuple[LayerPlan, Design]]]) -> None:
        share, cache = self.team.share(batches), self._cache
        total, done = sum(map(len, share)), 0
        for batch in share:
            measure_terms_together(cache, batch, self._subject)
            for layer, _ in batch:
                done += 1
                self.watch.measured(layer.target.name, done, total)

    def _responses(self, layers: Sequence[LayerPlan]) -> None:
        share, cache = self.team.share(layers), self._cache
        if share:
            for layer, points in zip(share, self._response_points(share), strict=True):
                write_part(cache.files(layer)[RESPONSE], points)

    def _measure_response(self, curves: Curves) -> None:
        """Put a few candidates into the model, one at a time, and see what that costs."""
        names = [curve.layer.target.name for curve in curves.layers]
        sample = set(measured_sample(names))
        self._do(
            "responses",
            [curve.layer for curve in curves.layers if curve.response is None and curve.layer.target.name in sample],
        )
        curves.read_again()
        spread_responses(curves)

    def _response_points(self, layers: Sequence[LayerPlan]) -> list[list[tuple[float, float]]]:
        """Predicted and measured losses of each layer's low-rank candidates at two sizes."""
        assert self.rows is not None
        by_name = {layer.target.name: layer for layer in layers}
        predicted: dict[str, list[float]] = {}

        def fitted(name: str) -> list[nn.Module]:
            subject = self._subject(by_name[name])
            designs = _measured_designs(by_name[name])
            predicted[name] = [candidate.loss for candidate in subject.measure(designs)]
            return [subject.fitted(design) for design in designs]

        chain, choosing = self.chain(), self.rows.choosing[:MEASURED_ROWS]
        model = self.model() if chain is None else chain.model
        batches = list(self.rows.batches(choosing, model))
        if chain is None:
            divergences = Divergences(model, batches)
            measured = {name: [divergences.of(name, replacement) for replacement in fitted(name)] for name in by_name}
        else:
            measured = divergences_by_block(chain, batches, list(by_name), fitted)
        return [list(zip(predicted[name], measured[name], strict=True)) for name in by_name]


class _Speeds(TypedDict):
    predicted: float | None
    measured: float | None


class _Record(TypedDict):
    allocation: dict[str, Any]
    speedup: _Speeds
    instead: bool


# what the file of a choice has to be
_FORM: TypeAdapter[_Record] = TypeAdapter(_Record)


@dataclass(frozen=True)
class Spent:
    """What a budget was spent on.

    Attributes:
        allocation: the designs.
        predicted_speedup: of the whole model, by the times of its layers; None for a budget of another kind.
        measured_speedup: of the whole model with fresh layers of these designs.
        instead: whether it is another budget than the one that was taken first.
    """

    allocation: Allocation
    predicted_speedup: float | None = None
    measured_speedup: float | None = None
    instead: bool = False

    def to_json(self) -> bytes:
        """The choice alone, for a run that goes on from finished layers."""
        speeds = {"predicted": self.predicted_speedup, "measured": self.measured_speedup}
        record = {"allocation": self.allocation.to_json(), "speedup": speeds, "instead": self.instead}
        return json.dumps(record).encode()

    @classmethod
    def from_json(cls, plan: ConversionPlan, content: bytes) -> "Spent":
        """What was written for the same targeted layers.

        Raises:
            CorruptCheckpointError: when it is none of them.
        """
        try:
            record = _FORM.validate_python(parse_json(content))
            allocation = Allocation.from_json(plan, record["allocation"])
        except (ValueError, OverflowError):
            # what pydantic and a design refuse are ValueErrors
            raise CorruptCheckpointError(
                f"{CHOICE_FILE} of the unfinished run is damaged; discard the run with --force"
            ) from None
        speeds = record["speedup"]
        return cls(allocation, speeds["predicted"], speeds["measured"], record["instead"])


def limit_of(budget: Budget, plan: ConversionPlan, device: str, identity: CacheIdentity) -> Limit:
    """The limit of a budget, with times of layers where they matter."""
    times = None
    if budget.speedup is not None or not budget.allow_slower:
        times = TimeTable(budget.batch_tokens, device, identity.torch_dtype)
    return Limit(budget, plan.layers, times)


def timed_limit(limit: Limit, source: Checkpoint) -> Limit | None:
    """A limit of time, from the time of the dense model that an earlier run has left; None where there is none.

    Raises:
        OutOfReachError: when the smallest designs do not reach the speed-up.
    """
    assert limit.times is not None
    assert limit.budget.speedup is not None
    times = limit.times.of_model(_timed_model(source, limit), limit.budget.rows)
    if times is None:
        return None
    whole = whole_model(*times, limit)
    most = check_speedup(whole, limit, lambda layer: smallest_designs(layer, limit.budget))
    return replace(limit, seconds=whole.allowed(aimed(limit.budget.speedup, most)))


def _timed_model(source: Checkpoint, limit: Limit) -> str:
    """What a checkpoint with these targets is called in the table of times."""
    names = "\n".join(layer.target.name for layer in limit.layers)
    return f"{source.sha256()} {sha256(names.encode()).hexdigest()[:32]}"


def compare_speedups(
    curves: Curves, limit: Limit, source: Checkpoint, speedups: Sequence[float]
) -> list[dict[str, Any]] | None:
    """What speed-ups would cost, as plain values; those out of reach are left out. None where the model was not timed."""
    rows = []
    for speedup in speedups:
        budget = limit.budget.model_copy(update={"speedup": speedup})
        try:
            timed = timed_limit(replace(limit, budget=budget), source)
            if timed is None:
                return None
            allocation = allocate(curves, timed)
        except OptionError:
            continue
        rows.append({"speedup": speedup, **budget_row(allocation)})
    return rows


def _measured_designs(layer: LayerPlan) -> list[Design]:
    in_features, out_features = layer.target.in_features, layer.target.out_features
    sizes = [max(int(share * in_features * out_features), in_features + out_features) for share in MEASURED_SHARES]
    terms = [LowRank.designs(in_features, out_features, parameters)[0] for parameters in sizes]
    return [Design(in_features, out_features, (term,)) for term in terms]
