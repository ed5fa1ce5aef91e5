"""All fits of one conversion, stored one by one, so that a run can be interrupted anywhere and go on to the same bytes.

Only the weight of the layer at work is in memory while layers are fitted; the whole model is loaded for the calibration
run alone (sequential fitting replaces layers in a copy that shares all others), and not at all without calibration data.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.fitting.budget import Choice
from spmconvert.fitting.calibration import CalibrationRows
from spmconvert.layerfit import LayerRecord, Moments, fit_layer, gather_moments, statistics_groups
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan import ConversionPlan, LayerPlan
from spmconvert.recipe import Recipe
from spmconvert.sequential import Regression, Streams, layer_blocks, regress
from spmconvert.surgery.architecture import model_class
from spmconvert.surgery.swap import copy_sharing_tensors, layer_from_spec, replace_module


class Progress(Protocol):
    """Who wants to know how a conversion gets on."""

    def measured(self, name: str, done: int, total: int) -> None:
        """A layer's curve is there."""

    def planned(self, plan: ConversionPlan) -> None:
        """The layers are known."""

    def calibrating(self, done: int, total: int) -> None:
        """So many calibration batches are through."""

    def fitted(self, record: LayerRecord, done: int, total: int) -> None:
        """A layer is finished."""

    def writing(self, total_bytes: int) -> None:
        """The output is being written."""


class Silent:
    """Nobody listens."""

    def measured(self, name: str, done: int, total: int) -> None:
        """Nobody listens."""

    def planned(self, plan: ConversionPlan) -> None:
        """Nobody listens."""

    def calibrating(self, done: int, total: int) -> None:
        """Nobody listens."""

    def fitted(self, record: LayerRecord, done: int, total: int) -> None:
        """Nobody listens."""

    def writing(self, total_bytes: int) -> None:
        """Nobody listens."""


@dataclass
class FitRun:
    """What the steps of one conversion share; ``choice`` is what a budget was spent on, None without one."""

    source: Checkpoint
    config: Any
    plan: ConversionPlan
    choice: Choice | None
    recipe: Recipe
    rows: CalibrationRows | None
    device: str
    target: OutputDirectory
    progress: Progress


def fit_all(run: FitRun) -> tuple[LayerRecord, ...]:
    """Fit and store every layer that is not stored yet; returns all records in order."""
    records: dict[str, LayerRecord] = {}
    for layer in run.plan.layers:
        stored = run.target.load_layer(layer.target.name)
        if stored is not None:
            records[layer.target.name] = LayerRecord(**stored[1])
    if len(records) < len(run.plan.layers):
        for layer, moments, regression in _sequential(run) if run.recipe.fit.sequential else _independent(run, records):
            record = records.get(layer.target.name) or _fit_one(run, layer, moments, regression)
            records[layer.target.name] = record
            run.progress.fitted(record, len(records), len(run.plan.layers))
    return tuple(records[layer.target.name] for layer in run.plan.layers)


def load_dense_model(directory: Path, config: Any, device: str) -> Any:
    """The dense model as it is calibrated."""
    model = model_class(config).from_pretrained(directory, dtype="auto")
    # half precision products are slow on a CPU and round the statistics
    return model.float().eval() if device == "cpu" else model.to(device).eval()


_Work = tuple[LayerPlan, Moments | None, Regression | None]


def _independent(run: FitRun, records: dict[str, LayerRecord]) -> Iterable[_Work]:
    """Layers that are not stored, with the moments of what the dense model feeds them."""
    model = None
    for group in statistics_groups(run.plan.layers, weighted=run.recipe.weights_fits):
        waiting = [layer for layer in group if layer.target.name not in records]
        moments: dict[str, Moments] = {}
        if waiting and run.rows is not None:
            model = model or load_dense_model(run.source.directory, run.config, run.device)
            # of the whole group, so that a resumed run forms the same sums
            moments = _gather(run, model, group)
        if group[-1] is run.plan.layers[-1]:
            model = None
        for layer in waiting:
            yield layer, moments.pop(layer.target.name, None), None


def _sequential(run: FitRun) -> Iterable[_Work]:
    """All layers, block by block, with regressions on what the layers stored so far make of the rows."""
    assert run.rows is not None
    dense = load_dense_model(run.source.directory, run.config, run.device)
    converted = copy_sharing_tensors(dense)
    plans = {layer.target.name: layer for layer in run.plan.layers}
    container, blocks = layer_blocks(dense, list(plans))
    streams = Streams(dense, converted, container, list(run.rows.batches(run.rows.fitted, dense)))
    for index, names in enumerate(blocks):
        moments = _gather(run, dense, [plans[name] for name in names]) if names else {}
        for name in names:
            layer = plans[name]
            if run.target.load_layer(name) is None:
                module = dense.get_submodule(name)
                weight = (module.weight.t() if layer.spec.fan_in_fan_out else module.weight).detach().float().cpu()
                regression = regress(streams, index, layer, dense, converted, weight)
            else:
                regression = None
            yield layer, moments.pop(name), regression
            replace_module(converted, name, _stored_layer(run, layer).to(converted.device).eval())
        streams.advance(index)


def _gather(run: FitRun, model: Any, layers: list[LayerPlan]) -> dict[str, Moments]:
    assert run.rows is not None
    weighted = run.recipe.weights_fits
    return gather_moments(model, layers, run.rows, run.progress.calibrating, weighted=weighted, seed=run.recipe.seed)


def _fit_one(run: FitRun, layer: LayerPlan, moments: Moments | None, regression: Regression | None) -> LayerRecord:
    weight = run.source.read_finite(layer.weight).to(run.device)
    weight = weight.t() if layer.spec.fan_in_fan_out else weight
    bias = None if layer.bias is None else run.source.read_finite(layer.bias).to(run.device)
    fitted, record = fit_layer(
        layer, weight, bias, moments, iterations=run.recipe.fit.iterations, seed=run.recipe.seed, regression=regression
    )
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in fitted.named_parameters()}
    run.target.store_layer(layer.target.name, tensors, asdict(record))
    return record


def _stored_layer(run: FitRun, layer: LayerPlan) -> SPMLinear:
    """A finished layer as the conversion stores it, in float32."""
    stored = run.target.load_layer(layer.target.name)
    assert stored is not None
    built = layer_from_spec(layer.spec)
    built.load_state_dict(stored[0])
    return built.float()
