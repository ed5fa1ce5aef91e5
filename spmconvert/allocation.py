"""Spend a budget over the layers of a model: measure every layer's curve once, then choose for any budget.

Curves are kept in the cache directory by what decides about them (checkpoint, class and dtype of the model, layer,
calibration text and rows, kind of sensitivity, structures), so a second budget costs seconds. Layers whose dense form is
the best use of the budget are left alone.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from spmconvert.caches import cache_directory, check_cache
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.distill.objective import objective_of
from spmconvert.errors import OptionError
from spmconvert.fitting.budget import Choice, check_budget, choose
from spmconvert.fitting.calibration import CalibrationRows
from spmconvert.fitting.curve import Candidate, Structure, candidate_geometries, measure_curve
from spmconvert.fitting.lowrank import rank_at
from spmconvert.fitting.solve import fit_
from spmconvert.layerfit import Moments, gather_moments, statistics_groups
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan import DTYPE_BYTES, ConversionPlan, LayerPlan
from spmconvert.recipe import Budget, Recipe
from spmconvert.response import MEASURED_ROWS, MEASURED_SHARES, Response, divergence
from spmconvert.surgery.targets import Skipped
from spmconvert.text import tokenizer_hash

# changes with anything that changes what a curve holds
CURVE_VERSION = 5
# name of what is measured beside the curves of all structures
RESPONSE = "response"
# shares of the targeted parameters that a dry run compares
COMPARED_BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Form:
    """How a model is measured; its curves hold for no other class or dtype of the same checkpoint.

    Attributes:
        architecture: its class, which may be another than the checkpoint's while a model is loaded.
        dtype: of its weights.
    """

    architecture: str
    dtype: str

    @classmethod
    def of_checkpoint(cls, source: Checkpoint, device: str) -> "Form":
        """As ``spmconvert.fitrun.load_dense_model`` loads it."""
        return cls((source.config.get("architectures") or [""])[0], "float32" if device == "cpu" else "auto")

    @classmethod
    def of_model(cls, model: Any) -> "Form":
        """As it is."""
        return cls(type(model).__name__, str(model.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Curves:
    """The measured candidates of all planned layers.

    Attributes:
        plan: the layers, in the order of the model.
        candidates: by layer, in the same order.
    """

    plan: ConversionPlan
    candidates: tuple[tuple[Candidate, ...], ...]

    def allocate(self, budget: Budget) -> "Allocation":
        """Choose for a budget.

        Raises:
            OptionError: when the smallest candidates exceed the budget, or no layer would change.
        """
        layers = self.plan.layers
        options = [(*own, None) for own in self.candidates]
        losses = [[0.0 if one is None else one.loss for one in own] for own in options]
        if budget.max_error is not None:
            chosen = tuple(_smallest(layer, own, budget.max_error) for layer, own in zip(layers, options, strict=True))
            loss = sum(own[index] for own, index in zip(losses, chosen, strict=True))
            picks = zip(layers, options, chosen, strict=True)
            size = sum(_parameters(layer, own[index]) for layer, own, index in picks)
            choice = Choice(chosen, size, loss, bound=0.0)
        else:
            costs = [[_cost(layer, one, budget) for one in own] for layer, own in zip(layers, options, strict=True)]
            choice = choose(costs, losses, _limit(layers, budget), budget.unit)
        picked = tuple(own[index] for own, index in zip(options, choice.chosen, strict=True))
        if not any(picked):
            remedy = "allow less" if budget.max_error is None else f"allow a larger error than {budget.max_error:g}"
            raise OptionError(f"{next(iter(budget.limits))} leaves every layer dense; {remedy}")
        return Allocation(_planned(self.plan, picked), choice, picked)


@dataclass(frozen=True)
class Allocation:
    """What a budget is spent on.

    Attributes:
        plan: the conversion with the chosen designs; layers that stay dense are left out.
        choice: the solver's answer.
        picked: the chosen candidate of every targeted layer, None for those that stay dense.
    """

    plan: ConversionPlan
    choice: Choice
    picked: tuple[Candidate | None, ...]

    def to_json(self) -> bytes:
        """The choice alone, for a run that goes on from finished layers."""
        picked = [candidate and asdict(candidate) for candidate in self.picked]
        return json.dumps({"choice": asdict(self.choice), "picked": picked}).encode()

    @classmethod
    def from_json(cls, plan: ConversionPlan, content: bytes) -> "Allocation":
        """The allocation that was written for the same targeted layers."""
        found = json.loads(content)
        picked = tuple(None if one is None else Candidate(**one) for one in found["picked"])
        choice = Choice(**{**found["choice"], "chosen": tuple(found["choice"]["chosen"])})
        return cls(_planned(plan, picked), choice, picked)


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


def read_curves(source: Checkpoint, plan: ConversionPlan, recipe: Recipe, form: Form) -> Curves | None:
    """Curves of an earlier run, or None where one is missing."""
    cache = _Cache.of(source, recipe, form)
    found = [{part: _read(file) for part, file in cache.files(layer).items()} for layer in plan.layers]
    if any(part is None for own in found for part in own.values()):
        return None
    return Curves(plan, tuple(_assembled(own) for own in found))


def measure_curves(
    source: Checkpoint,
    plan: ConversionPlan,
    recipe: Recipe,
    form: Form,
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
        form: of the model that ``load_dense`` gives.
        rows: calibration rows, or None without data.
        load_dense: loads the dense model on the device to fit on.
        calibrating: told how many calibration batches are through, and of how many.
        report: told the layer that is done, how many are, and of how many.

    Raises:
        CalibrationError: when a layer has no influence or what is measured is not finite.
        OptionError: when sensitivity needs calibration data and there is none, no candidates are within the budget, or
            all dense layers are.
        NotWritableError: when the cache cannot be written.
    """
    check_measurable(recipe)
    _check_reachable(plan, recipe.budget)
    check_cache("curves")
    cache = _Cache.of(source, recipe, form)
    model: Any = None
    found: dict[str, tuple[Candidate, ...]] = {}
    weighted = recipe.predicts_loss or recipe.weights_fits
    for group in statistics_groups(plan.layers, weighted=weighted):
        moments: dict[str, Moments] = {}
        for layer in group:
            name = layer.target.name
            files = cache.files(layer)
            parts = {part: _read(file) for part, file in files.items()}
            for part in [part for part, kept in parts.items() if kept is None]:
                model = model or load_dense()
                if not moments and rows is not None:
                    moments = gather_moments(model, group, rows, calibrating, weighted=weighted, seed=recipe.seed)
                subject = _Subject.of(model, layer, moments.get(name), recipe)
                if part == RESPONSE:
                    assert rows is not None
                    parts[part] = _measure_response(model, subject, rows)
                else:
                    parts[part] = [asdict(one) for one in _measure_structure(subject, part)]
                _write(files[part], parts[part])
            found[name] = _assembled(parts)
            report(name, len(found), len(plan.layers))
    return Curves(plan, tuple(found[layer.target.name] for layer in plan.layers))


def compare_budgets(curves: Curves) -> list[dict[str, Any]]:
    """What every budget would buy, as plain values; budgets below the smallest designs are left out."""
    rows = []
    total = sum(layer.dense_parameters for layer in curves.plan.layers)
    for keep in COMPARED_BUDGETS:
        try:
            allocation = curves.allocate(Budget(keep=keep))
        except OptionError:
            continue
        layers = allocation.plan.layers
        geometries = [layer.spec.geometry for layer in layers]
        rows.append(
            {
                "keep": keep,
                "kept": allocation.choice.cost / total,
                "predicted_loss": allocation.choice.loss,
                "lower_bound": allocation.choice.bound,
                "low_rank": sum(g.stages == 0 for g in geometries),
                "stages": sum(g.stages > 0 and g.rank == 0 for g in geometries),
                "stages_with_companion": sum(g.stages > 0 and g.rank > 0 for g in geometries),
                "dense": len(curves.plan.layers) - len(layers),
                "output_bytes": allocation.plan.output_bytes,
            }
        )
    return rows


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
        found = measure_curve(
            geometries, (self.weight, self.bias), self.moments.fitted, self.moments.held_out, self.moments.metric,
            self.recipe.budget.iterations, weighted=self.recipe.weights_fits,
        )  # fmt: skip
        return found if self.recipe.predicts_loss else [replace(one, loss=one.error) for one in found]

    def built(self, geometry: Geometry) -> SPMLinear:
        """A candidate as a layer."""
        layer = SPMLinear(
            geometry.in_features, geometry.out_features, device=self.weight.device,
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
    batches = list(rows.batches(rows.held_out[:MEASURED_ROWS], model))
    return [
        (candidate.loss, divergence(model, subject.name, subject.built(geometry), batches))
        for geometry, candidate in zip(geometries, subject.measure(geometries), strict=True)
    ]


def _assembled(parts: dict[str, Any]) -> tuple[Candidate, ...]:
    """Candidates of all structures, their losses as the model was measured to respond."""
    found = [Candidate(**one) for part, kept in parts.items() if part != RESPONSE for one in kept]
    if RESPONSE not in parts:
        return tuple(found)
    response = Response.of(parts[RESPONSE])
    return tuple(replace(one, loss=response.loss(one.loss)) for one in found)


def _check_reachable(plan: ConversionPlan, budget: Budget) -> None:
    """Refuse a budget that the smallest designs exceed, or no dense layer does, before anything is measured."""
    if budget.max_error is not None:
        return
    costs = []
    for layer in plan.layers:
        sizes = (layer.target.in_features, layer.target.out_features)
        found = [g for structure in budget.structures for g in candidate_geometries(*sizes, structure)]
        options = [Candidate(g.stages, g.block, g.rank, 0.0, 0.0) for g in found]
        costs.append([_cost(layer, option, budget) for option in (*options, None)])
    limit, dense = _limit(plan.layers, budget), sum(own[-1] for own in costs)
    check_budget(costs, limit, budget.unit)
    if limit >= dense:
        raise OptionError(
            f"{next(iter(budget.limits))} allows {limit:,} {budget.unit}, and the targeted layers have {dense:,} as they "
            "are; allow less"
        )


def _parameters(layer: LayerPlan, candidate: Candidate | None) -> int:
    """Parameters of a candidate; None is the dense layer."""
    return layer.dense_parameters if candidate is None else _spec(layer, candidate).parameter_count()


def _cost(layer: LayerPlan, candidate: Candidate | None, budget: Budget) -> int:
    """In the budget's unit."""
    if budget.keep_flops is not None:
        return layer.flops[0] if candidate is None else _spec(layer, candidate).geometry.flops_per_token()
    if budget.keep_bytes is None:
        return _parameters(layer, candidate)
    return layer.dense_bytes if candidate is None else _parameters(layer, candidate) * DTYPE_BYTES[layer.stored_dtype]


def _limit(layers: Sequence[LayerPlan], budget: Budget) -> int:
    if budget.keep_bytes is not None:
        return budget.keep_bytes
    if budget.keep_flops is not None:
        return int(budget.keep_flops * sum(layer.flops[0] for layer in layers))
    return int((budget.keep or 1.0) * sum(layer.dense_parameters for layer in layers))


def _smallest(layer: LayerPlan, options: Sequence[Candidate | None], max_error: float) -> int:
    """Index of the smallest candidate whose error is allowed; the dense layer is one."""
    allowed = [index for index, one in enumerate(options) if one is None or one.error <= max_error]
    return min(allowed, key=lambda index: _parameters(layer, options[index]))


def _spec(layer: LayerPlan, candidate: Candidate) -> LayerSpec:
    return replace(layer.spec, geometry=candidate.geometry(layer.target.in_features, layer.target.out_features))


def _planned(plan: ConversionPlan, picked: Sequence[Candidate | None]) -> ConversionPlan:
    layers, dense = [], []
    for layer, candidate in zip(plan.layers, picked, strict=True):
        if candidate is None:
            dense.append(layer)
        else:
            layers.append(replace(layer, spec=_spec(layer, candidate)))
    skipped = [Skipped(layer.target.name, "dense is the best use of the budget") for layer in dense]
    selection = replace(
        plan.selection,
        targets=tuple(layer.target for layer in layers),
        skipped=(*plan.selection.skipped, *skipped),
    )
    return ConversionPlan(tuple(layers), selection, plan.other_bytes + sum(layer.dense_bytes for layer in dense))


@dataclass(frozen=True)
class _Cache:
    """Where curves are kept by structure, and the model's response to errors beside them.

    Attributes:
        parts: structures, and the response where it is measured.
        shared: what decides about the curves of all layers.
    """

    parts: tuple[str, ...]
    shared: dict[str, Any]

    @classmethod
    def of(cls, source: Checkpoint, recipe: Recipe, form: Form) -> "_Cache":
        calibration = recipe.calibration
        shared = {
            "version": CURVE_VERSION,
            "source": source.sha256(),
            "form": asdict(form),
            "calibration": calibration.model_dump(exclude={"file"}),
            "seed": recipe.seed,
            "budget": recipe.budget.model_dump(include={"sensitivity", "iterations"}),
            "weighted": recipe.weights_fits,
        }
        if calibration.file is not None:
            shared["text"] = hashlib.sha256(calibration.file.read_bytes()).hexdigest()
            shared["tokenizer"] = tokenizer_hash(source.directory)
        response = (RESPONSE,) if _measures_response(form, recipe) else ()
        return cls((*recipe.budget.structures, *response), shared)

    def files(self, layer: LayerPlan) -> dict[str, Path]:
        """Files of a layer by part."""
        decides = json.dumps({**self.shared, "layer": layer.target.name, "bias": layer.spec.bias}, sort_keys=True)
        digests = {part: hashlib.sha256(f"{decides}:{part}".encode()).hexdigest() for part in self.parts}
        return {part: cache_directory("curves") / f"{digest[:32]}.json" for part, digest in digests.items()}


def _measures_response(form: Form, recipe: Recipe) -> bool:
    """Whether losses are scaled by what a model with one replaced layer loses; see ``spmconvert.response``."""
    if recipe.budget.sensitivity != "gradient":
        return recipe.budget.sensitivity == "kl"
    return objective_of(form.architecture) != "hidden"


def _read(file: Path) -> list[Any] | None:
    """What was kept, or None where it has to be measured: there is no file, or it is damaged."""
    try:
        found: list[Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write(file: Path, content: Any) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(file)
