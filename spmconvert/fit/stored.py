"""What the fits of one conversion share, and one of them: fitted, measured, and stored beside the output that will be."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from spmconvert.calibrate.store import Moments, MomentStore
from spmconvert.checkpoint.places import BATCHES_FILE
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.data.calibration import CalibrationRows
from spmconvert.fit.batches import in_batches, may_batch
from spmconvert.fit.layer import LayerRecord, fit_layer, fit_layers
from spmconvert.fit.progress import Progress
from spmconvert.fit.sequential import Regression
from spmconvert.model.architecture import skeleton
from spmconvert.model.chain import Chain, common_list
from spmconvert.model.loading import DenseModel
from spmconvert.model.swap import layer_from_spec
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import ConversionPlan, LayerPlan
from spmconvert.recipe.recipe import Recipe
from spmconvert.system.parsing import parse_json
from spmconvert.system.team import ALONE, Team


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
        team: who works on it.
        batch: layers that are fitted together, in place of what ``batches`` finds for the device.
    """

    source: Checkpoint
    dense: DenseModel
    plan: ConversionPlan
    recipe: Recipe
    rows: CalibrationRows | None
    moments: MomentStore | None
    target: OutputDirectory
    progress: Progress
    team: Team = ALONE
    batch: int | None = None

    def chain(self) -> Chain | None:
        """The dense model's blocks, one in memory at a time; None without data, or where the layers are in no chain."""
        return chain_of(self.dense, self.plan, self.rows)


def chain_of(dense: DenseModel, plan: ConversionPlan, rows: CalibrationRows | None) -> Chain | None:
    """The blocks that all layers of a plan are in; None without rows to try them on, or where they are no chain."""
    found = common_list(skeleton(dense.config), [layer.target.name for layer in plan.layers])
    if rows is None or found is None:
        return None
    return dense.chain(found[0], lambda model: next(rows.batches(rows.fitted[:1], model)))


def dense_tensors(run: FitRun, layer: LayerPlan) -> tuple[Tensor, Tensor | None]:
    """Weight [out_features, in_features] and bias of a dense layer, float32, on the device of the run."""
    weight = run.source.read_finite(layer.weight).to(run.dense.device)
    weight = weight.t() if layer.spec.fan_in_fan_out else weight
    bias = None if layer.bias is None else run.source.read_finite(layer.bias).to(run.dense.device).float()
    return weight.float(), bias


def moments_of(run: FitRun, layer: LayerPlan) -> Moments | None:
    """What calibration says about a layer, or None without data."""
    return None if run.moments is None else run.moments.read(layer.target.name)


def fit_one(run: FitRun, layer: LayerPlan, regression: Regression | None = None) -> LayerRecord:
    """Fit and store a layer."""
    weight, bias = dense_tensors(run, layer)
    moments = moments_of(run, layer)
    fitted, record = fit_layer(
        layer, weight, bias, moments, iterations=run.recipe.fit.iterations, seed=run.recipe.seed, regression=regression
    )
    _store(run, fitted, record)
    return record


def _store(run: FitRun, fitted: SPMLinear, record: LayerRecord) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitted.state_dict().items()}
    run.target.store_layer(record.name, tensors, asdict(record))


def fit_together(run: FitRun, layers: Sequence[LayerPlan]) -> list[LayerRecord]:
    """Fit a batch, each layer on what the dense model feeds it, and store what is not stored yet; returns that.

    What is stored already is fitted again with the others, since a batch rounds by who is in it.
    """
    if len(layers) == 1:
        return [fit_one(run, layers[0])]
    work = [(layer, *dense_tensors(run, layer), moments_of(run, layer)) for layer in layers]
    missing = []
    for fitted, record in fit_layers(work, iterations=run.recipe.fit.iterations, seed=run.recipe.seed):
        if run.target.layers.record(record.name) is None:
            _store(run, fitted, record)
            missing.append(record)
    return missing


def kept_batches(run: FitRun, groups: Iterable[Sequence[LayerPlan]]) -> list[list[LayerPlan]]:
    """Batches within groups of layers, those of the run that this one goes on from where it had any.

    Another one may find other room on the device.
    """
    layers = [list(group) for group in groups]
    if not may_batch(run.dense.device, run.batch):
        return [[layer] for group in layers for layer in group]
    stored = run.target.load_file(BATCHES_FILE)
    if stored is not None:
        by_name = {layer.target.name: layer for group in layers for layer in group}
        return [[by_name[name] for name in names] for names in parse_json(stored)]
    found = [
        batch
        for group in layers
        for batch in in_batches(group, lambda layer: layer.spec.design, run.dense.device, run.batch)
    ]
    names = [[layer.target.name for layer in batch] for batch in found]
    run.target.store_file(BATCHES_FILE, json.dumps(names).encode())
    return found


def stored_layer(run: FitRun, layer: LayerPlan) -> SPMLinear:
    """A finished layer as the conversion stores it, in float32."""
    stored = run.target.layers.load(layer.target.name)
    assert stored is not None
    built = layer_from_spec(layer.spec)
    built.load_state_dict(stored[0])
    return built.float()
