"""All fits of one conversion, stored one by one, so that a run can be interrupted anywhere and go on to the same bytes.

Only the weight of the layer at work is in memory while layers are fitted; the whole model is loaded for the calibration
run alone, and not at all without calibration data. Sequential fits run through the model all the time, so their blocks
stay on disk and are read as they are needed (6 Llama blocks of 235 MB: 0.9 GB at the peak, 2.0 GB with all in memory).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import Tensor

from spmconvert.calibrate.moments import Moments, MomentStore
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.data.calibration import CalibrationRows
from spmconvert.fit.layer import LayerRecord, fit_layer
from spmconvert.fit.progress import Progress
from spmconvert.fit.sequential import Regression, Streams, calling_order, layer_blocks, regress
from spmconvert.model.architecture import skeleton
from spmconvert.model.loading import DenseModel, load_with_blocks_on_disk
from spmconvert.model.swap import layer_from_spec
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import ConversionPlan, LayerPlan
from spmconvert.recipe.recipe import Recipe

# rows that run through both models: all of 256 take a third of a conversion of all-MiniLM-L6-v2
SEQUENTIAL_ROWS = 128


@dataclass
class FitRun:
    """What the fits of one conversion share.

    Attributes:
        source: the dense checkpoint.
        dense: its model, for the calibration run.
        plan: what is built.
        recipe: how it is fitted.
        rows: calibration rows, or None without data.
        moments: what they say about each layer, or None without data.
        target: where finished layers are stored.
        progress: told how it gets on.
    """

    source: Checkpoint
    dense: DenseModel
    plan: ConversionPlan
    recipe: Recipe
    rows: CalibrationRows | None
    moments: MomentStore | None
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


_Work = tuple[LayerPlan, Moments | None, Regression | None]


def _independent(run: FitRun, records: dict[str, LayerRecord]) -> Iterator[_Work]:
    """Layers that are not stored, with the moments of what the dense model feeds them."""
    # fits on the dense model's activations need no model
    run.dense.release()
    for layer in run.plan.layers:
        if layer.target.name not in records:
            yield layer, _moments(run, layer), None


def _moments(run: FitRun, layer: LayerPlan) -> Moments | None:
    return None if run.moments is None else run.moments.read(layer.target.name)


def _sequential(run: FitRun, records: dict[str, LayerRecord]) -> Iterator[_Work]:
    """All layers, block by block, with regressions on what the layers stored so far make of the rows."""
    assert run.rows is not None
    dense = run.dense
    container, blocks = layer_blocks(skeleton(dense.config), [layer.target.name for layer in run.plan.layers])
    if dense.is_loaded:
        model = dense()
    else:
        folder = run.target.partial / "offloaded"
        model = load_with_blocks_on_disk(dense.directory, dense.config, dense.device, container, folder)
    rows = run.rows.fitted[:SEQUENTIAL_ROWS]
    streams = Streams(model, container, list(run.rows.batches(rows, model)), blocks)
    order = calling_order(model, list(blocks), next(run.rows.batches(run.rows.fitted[:1], model)))
    layers = sorted(run.plan.layers, key=lambda layer: (blocks[layer.target.name], order.index(layer.target.name)))
    reached = 0
    for layer in layers:
        name = layer.target.name
        for index in range(reached, blocks[name]):
            streams.advance(index)
        reached = blocks[name]
        moments = regression = None
        if name not in records:
            moments = _moments(run, layer)
            weight = run.source.read_finite(layer.weight)
            regression = regress(streams, reached, name, (weight.t() if layer.spec.fan_in_fan_out else weight).float())
        yield layer, moments, regression
        streams.convert(name, stored_layer(run, layer).to(run.dense.device).eval())


def dense_tensors(run: FitRun, layer: LayerPlan) -> tuple[Tensor, Tensor | None]:
    """Weight [out_features, in_features] and bias of a dense layer, float32, on the device of the run."""
    weight = run.source.read_finite(layer.weight).to(run.dense.device)
    weight = weight.t() if layer.spec.fan_in_fan_out else weight
    bias = None if layer.bias is None else run.source.read_finite(layer.bias).to(run.dense.device).float()
    return weight.float(), bias


def _fit_one(run: FitRun, layer: LayerPlan, moments: Moments | None, regression: Regression | None) -> LayerRecord:
    weight, bias = dense_tensors(run, layer)
    fitted, record = fit_layer(
        layer, weight, bias, moments, iterations=run.recipe.fit.iterations, seed=run.recipe.seed, regression=regression
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitted.state_dict().items()}
    run.target.store_layer(layer.target.name, tensors, asdict(record))
    return record


def stored_layer(run: FitRun, layer: LayerPlan) -> SPMLinear:
    """A finished layer as the conversion stores it, in float32."""
    stored = run.target.load_layer(layer.target.name)
    assert stored is not None
    built = layer_from_spec(layer.spec)
    built.load_state_dict(stored[0])
    return built.float()
