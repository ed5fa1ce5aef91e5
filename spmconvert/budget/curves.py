"""Measure what every layer loses by every design of every structure, once for all budgets.

A candidate is fitted with few iterations, so its loss is a little above that of the final fit of the same design.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from spmconvert.budget.cache import RESPONSE, CacheIdentity, CurveCache, read_part, write_part
from spmconvert.budget.candidates import Candidate, Structure, candidate_geometries, measure_curve
from spmconvert.budget.response import MEASURED_ROWS, MEASURED_SHARES, Response, divergence
from spmconvert.calibrate.moments import Moments, gather_moments
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.calibration import CalibrationRows
from spmconvert.errors import OptionError
from spmconvert.operator.factors import rank_at
from spmconvert.fit.solver import fit_
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import ConversionPlan, LayerPlan, statistics_groups
from spmconvert.recipe.recipe import Recipe
from spmconvert.system.caches import check_cache


@dataclass(frozen=True)
class Curves:
    """The measured candidates of all planned layers.

    Attributes:
        plan: the layers, in the order of the model.
        candidates: by layer, in the same order.
    """

    plan: ConversionPlan
    candidates: tuple[tuple[Candidate, ...], ...]


def check_measurable(recipe: Recipe) -> None:
    """Refuse a budget that needs calibration rows and has none.

    Raises:
        OptionError: when it does.
    """
    if recipe.calibration.file is None and recipe.budget.sensitivity != "none":
        raise OptionError(
            f"sensitivity {recipe.budget.sensitivity} is measured on calibration rows; give --calib FILE, or "
            "--sensitivity none"
        )


def read_curves(
    source: Checkpoint, plan: ConversionPlan, recipe: Recipe, identity: CacheIdentity, text: str | None
) -> Curves | None:
    """Curves of an earlier run, or None where one is missing; ``text`` is the hash of the calibration text."""
    cache = CurveCache.of(source, recipe, identity, text)
    parts_by_layer = [{part: read_part(file) for part, file in cache.files(layer).items()} for layer in plan.layers]
    if any(content is None for parts in parts_by_layer for content in parts.values()):
        return None
    return Curves(plan, tuple(_assembled(parts) for parts in parts_by_layer))


def measure_curves(
    source: Checkpoint,
    plan: ConversionPlan,
    recipe: Recipe,
    identity: CacheIdentity,
    rows: CalibrationRows | None,
    load_dense: Callable[[], Any],
    calibrating: Callable[[int, int], None],
    report: Callable[[str, int, int], None],
) -> Curves:
    """Measure the curves that no earlier run has left.

    Args:
        source: the checkpoint.
        plan: its targeted layers.
        recipe: with a budget.
        identity: of the model that ``load_dense`` gives.
        rows: calibration rows, or None without data.
        load_dense: loads the dense model on the device to fit on.
        calibrating: told how many calibration batches are through, and of how many.
        report: told the layer that is done, how many are, and of how many.

    Raises:
        CalibrationError: when a layer has no influence or what is measured is not finite.
        OptionError: when sensitivity needs calibration data and there is none.
        NotWritableError: when the cache cannot be written.
    """
    check_measurable(recipe)
    check_cache("curves")
    cache = CurveCache.of(source, recipe, identity, None if rows is None else rows.file_sha256)
    model: Any = None
    candidates: dict[str, tuple[Candidate, ...]] = {}
    weighted = recipe.predicts_loss or recipe.weights_fits
    for group in statistics_groups(plan.layers, weighted=weighted):
        moments: dict[str, Moments] = {}
        for layer in group:
            name = layer.target.name
            files = cache.files(layer)
            parts = {part: read_part(file) for part, file in files.items()}
            for part in [part for part, content in parts.items() if content is None]:
                model = model or load_dense()
                if not moments and rows is not None:
                    moments = gather_moments(
                        model, group, rows, calibrating, choosing=True, weighted=weighted, seed=recipe.seed
                    )
                subject = _Subject.of(model, layer, moments.get(name), recipe)
                if part == RESPONSE:
                    assert rows is not None
                    parts[part] = _measure_response(model, subject, rows)
                else:
                    parts[part] = [asdict(candidate) for candidate in _measure_structure(subject, part)]
                write_part(files[part], parts[part])
            candidates[name] = _assembled(parts)
            report(name, len(candidates), len(plan.layers))
    return Curves(plan, tuple(candidates[layer.target.name] for layer in plan.layers))


@dataclass(frozen=True)
class _Subject:
    """A dense layer at work, with what is known about it: weight [out_features, in_features], bias, and moments."""

    name: str
    weight: Tensor
    bias: Tensor | None
    moments: Moments
    recipe: Recipe

    @classmethod
    def of(cls, model: Any, layer: LayerPlan, moments: Moments | None, recipe: Recipe) -> "_Subject":
        module = model.get_submodule(layer.target.name)
        weight = (module.weight.t() if layer.spec.fan_in_fan_out else module.weight).detach().float()
        bias = None if module.bias is None else module.bias.detach().float()
        known = (moments or Moments.isotropic(weight.shape[1])).to(weight.device)
        return cls(layer.target.name, weight, bias, known, recipe)

    def measure(self, geometries: Sequence[Geometry]) -> list[Candidate]:
        """Candidates with the predicted loss, or with the relative error where none is predicted."""
        candidates = measure_curve(
            geometries, (self.weight, self.bias), self.moments.fitted, self.moments.measured, self.moments.metric,
            self.recipe.budget.iterations, weighted=self.recipe.weights_fits,
        )  # fmt: skip
        if self.recipe.predicts_loss:
            return candidates
        return [replace(candidate, loss=candidate.error) for candidate in candidates]

    def built(self, geometry: Geometry) -> SPMLinear:
        """A candidate as a layer."""
        layer = SPMLinear(
            geometry.in_features, geometry.out_features, device=self.weight.device, dtype=torch.float32,
            stages=geometry.stages, block=geometry.block, rank=geometry.rank,
        )  # fmt: skip
        metric = self.moments.metric if self.recipe.weights_fits else None
        fit_(layer, self.weight, self.bias, self.moments.fitted, iterations=self.recipe.budget.iterations, metric=metric)
        return layer


def _measure_structure(subject: _Subject, structure: str) -> list[Candidate]:
    out_features, in_features = subject.weight.shape
    return subject.measure(candidate_geometries(in_features, out_features, cast(Structure, structure)))


def _measure_response(model: Any, subject: _Subject, rows: CalibrationRows) -> list[tuple[float, float]]:
    out_features, in_features = subject.weight.shape
    ranks = {max(1, rank_at(int(share * subject.weight.numel()), in_features, out_features)) for share in MEASURED_SHARES}
    geometries = [Geometry.create(in_features, out_features, 0, "general", 1, rank) for rank in sorted(ranks)]
    batches = list(rows.batches(rows.choosing[:MEASURED_ROWS], model))
    return [
        (candidate.loss, divergence(model, subject.name, subject.built(geometry), batches))
        for geometry, candidate in zip(geometries, subject.measure(geometries), strict=True)
    ]


def _assembled(parts: dict[str, Any]) -> tuple[Candidate, ...]:
    """Candidates of all structures, their losses as the model was measured to respond."""
    candidates = [Candidate(**fields) for part, content in parts.items() if part != RESPONSE for fields in content]
    if RESPONSE not in parts:
        return tuple(candidates)
    response = Response.of(parts[RESPONSE])
    return tuple(replace(candidate, loss=response.loss(candidate.loss)) for candidate in candidates)
