"""All fits of one conversion, stored one by one, so that a run can be interrupted anywhere and go on to the same bytes.

Only the weight of the layer at work is in memory while layers are fitted; the whole model is loaded for the calibration
run alone, and not at all without calibration data. Sequential fits run through the model all the time, so their blocks
stay on disk and are read as they are needed (6 Llama blocks of 235 MB: 0.9 GB at the peak, 2.0 GB with all in memory);
with output weighting they cannot, since a gradient needs them all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from spmconvert.sequential import Regression, Streams, calling_order, layer_blocks, regress
from spmconvert.surgery.architecture import model_class, skeleton
from spmconvert.surgery.swap import layer_from_spec


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
        work = _sequential if run.recipe.fit.sequential else _independent
        for layer, moments, regression in work(run, records):
            record = records.get(layer.target.name) or _fit_one(run, layer, moments, regression)
            records[layer.target.name] = record
            run.progress.fitted(record, len(records), len(run.plan.layers))
    return tuple(records[layer.target.name] for layer in run.plan.layers)


def load_dense_model(directory: Path, config: Any, device: str) -> Any:
    """The dense model as it is calibrated."""
    model = model_class(config).from_pretrained(directory, dtype="auto")
    # half precision products are slow on a CPU and round the statistics
    return model.float().eval() if device == "cpu" else model.to(device).eval()


def load_with_blocks_on_disk(directory: Path, config: Any, device: str, container: str, folder: Path) -> Any:
    """The dense model with the weights of a list of blocks in the checkpoint's files, read whenever a block runs.

    Args:
        directory: checkpoint directory.
        config: the model's config.
        device: where it runs.
        container: name of the list of blocks.
        folder: for tensors that the model stores in another form than the checkpoint.
    """
    places = _places(skeleton(config), container, device)
    dtype = "float32" if device == "cpu" else "auto"
    loaded = model_class(config).from_pretrained(directory, dtype=dtype, device_map=places, offload_folder=folder)
    return loaded.eval()


def _places(model: Any, container: str, device: str) -> dict[str, str]:
    """A device map: blocks on disk, everything beside the way to them on the device."""
    places = {f"{container}.{index}": "disk" for index in range(len(model.get_submodule(container)))}
    way = container.split(".")
    for depth, following in enumerate(way):
        parent = model.get_submodule(".".join(way[:depth]))
        for name, _ in (*parent.named_children(), *parent.named_parameters(recurse=False)):
            if name != following:
                places[".".join((*way[:depth], name))] = device
    return places


_Work = tuple[LayerPlan, Moments | None, Regression | None]


def _independent(run: FitRun, records: dict[str, LayerRecord]) -> Iterator[_Work]:
    """Layers that are not stored, with the moments of what the dense model feeds them."""
    load = partial(load_dense_model, run.source.directory, run.config, run.device)
    for layer, moments in _with_moments(run, run.plan.layers, records, load):
        if layer.target.name not in records:
            yield layer, moments, None


def _sequential(run: FitRun, records: dict[str, LayerRecord]) -> Iterator[_Work]:
    """All layers, block by block, with regressions on what the layers stored so far make of the rows."""
    assert run.rows is not None
    container, blocks = layer_blocks(skeleton(run.config), [layer.target.name for layer in run.plan.layers])
    if run.recipe.weights_fits:
        model = load_dense_model(run.source.directory, run.config, run.device)
    else:
        folder = run.target.partial / "offloaded"
        model = load_with_blocks_on_disk(run.source.directory, run.config, run.device, container, folder)
    streams = Streams(model, container, list(run.rows.batches(run.rows.fitted, model)))
    order = calling_order(model, list(blocks), next(run.rows.batches(run.rows.fitted[:1], model)))
    layers = sorted(run.plan.layers, key=lambda layer: (blocks[layer.target.name], order.index(layer.target.name)))
    reached = 0
    for layer, moments in _with_moments(run, layers, records, lambda: model):
        name = layer.target.name
        for index in range(reached, blocks[name]):
            streams.advance(index)
        reached = blocks[name]
        regression = None
        if name not in records:
            weight = run.source.read_finite(layer.weight)
            regression = regress(streams, reached, name, (weight.t() if layer.spec.fan_in_fan_out else weight).float())
        yield layer, moments, regression
        streams.convert(name, _stored_layer(run, layer).to(run.device).eval())


def _with_moments(
    run: FitRun, layers: Sequence[LayerPlan], records: dict[str, LayerRecord], load: Callable[[], Any]
) -> Iterator[tuple[LayerPlan, Moments | None]]:
    """All layers, with what the dense model feeds those that are not stored."""
    model = None
    for group in statistics_groups(layers, weighted=run.recipe.weights_fits):
        moments: dict[str, Moments] = {}
        if run.rows is not None and any(layer.target.name not in records for layer in group):
            model = model or load()
            # of the whole group, so that a resumed run forms the same sums
            moments = _gather(run, model, group)
        if group[-1] is layers[-1]:
            model = None
        for layer in group:
            yield layer, moments.pop(layer.target.name, None)


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
