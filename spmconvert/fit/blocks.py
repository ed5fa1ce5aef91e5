"""Fits that follow a list of blocks: each block's layers to what the converted model feeds them, then the block as a whole.

What a block's refinement changed is stored as one file, its layers and its norms and biases, under the names that they have
in the output; the layers as they were fitted stay beside it.

On a GPU layers of a block that follow no other (experts, or all where fits are not in sequence) are solved together where
they have one shape (``batches``). Layers in sequence are not: each needs those before it, and the two or three that read
the same input, which could go together, are left as they are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.data.calibration import CalibrationRows
from spmconvert.data.tokens import reads_packed
from spmconvert.errors import CorruptCheckpointError
from spmconvert.fit.layer import LayerRecord, measured_again
from spmconvert.fit.refine import refine_
from spmconvert.fit.sequential import Regression, regress
from spmconvert.fit.stored import FitRun, dense_tensors, fit_one, fit_together, kept_batches, moments_of, stored_layer
from spmconvert.fit.streams import Streams, layer_blocks
from spmconvert.model.architecture import skeleton
from spmconvert.model.opened import restricted
from spmconvert.model.stored import StoredNames
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.plan import LayerPlan

# rows that run through both models, of models that read packed text and of others: the former gain a tenth of a nat by the
# second half, an encoder does not (docs/results.md)
PACKED_ROWS, OTHER_ROWS = 256, 128
# rows a batch, which is a step of a refinement
BATCH_ROWS = 4


@dataclass(frozen=True)
class _Block:
    """A block that has layers to replace.

    Attributes:
        index: position in the list.
        name: of the block in the model.
        layers: in the order of the plan.
    """

    index: int
    name: str
    layers: tuple[LayerPlan, ...]


def _blocks(run: FitRun) -> list[_Block]:
    container, places = layer_blocks(skeleton(run.dense.config), [layer.target.name for layer in run.plan.layers])
    found: dict[int, list[LayerPlan]] = {}
    for layer in run.plan.layers:
        found.setdefault(places[layer.target.name], []).append(layer)
    return [_Block(index, f"{container}.{index}", tuple(found[index])) for index in sorted(found)]


def is_refined(run: FitRun) -> bool:
    """Whether all blocks are stored as they were refined."""
    return all(run.target.blocks.record(block.name) is not None for block in _blocks(run))


def fit_in_blocks(run: FitRun, records: dict[str, LayerRecord]) -> None:
    """Fit and store all layers, and refine all blocks, that are not stored yet; fills in their records."""
    blocks = _blocks(run)
    changes = {block.name: run.target.blocks.record(block.name) for block in blocks} if run.recipe.fit.refine else {}
    for change in filter(None, changes.values()):
        records.update(_change(change).layers)
    if len(records) == len(run.plan.layers) and None not in changes.values():
        return
    ahead = kept_batches(run, [[layer for layer in block.layers if not _follows(run, layer)] for block in blocks])
    streams = _streams(run)
    for number, block in enumerate(blocks, 1):
        _fit_ahead(run, records, [batch for batch in ahead if len(batch) > 1 and batch[0] in block.layers])
        while streams.index < block.index:
            streams.advance()
        order = streams.calling_order()
        for layer in sorted(block.layers, key=lambda layer: order.index(layer.target.name)):
            if layer.target.name not in records:
                regression = _regression(run, streams, layer) if _follows(run, layer) else None
                records[layer.target.name] = fit_one(run, layer, regression)
                run.progress.fitted(records[layer.target.name], len(records), len(run.plan.layers))
            streams.convert(layer.target.name, stored_layer(run, layer).to(run.dense.device).eval())
        if run.recipe.fit.refine:
            if changes[block.name] is None:
                records.update(_refine(run, streams, block, records))
                run.progress.refined(block.name, number, len(blocks))
            _put_back_(run, streams, block)


def _follows(run: FitRun, layer: LayerPlan) -> bool:
    """Whether a layer is fitted on what the layers before it feed it."""
    # experts see other tokens in each of the two models
    return bool(run.recipe.fit.sequential) and not layer.target.group


def _fit_ahead(run: FitRun, records: dict[str, LayerRecord], batches: Sequence[Sequence[LayerPlan]]) -> None:
    """Fit batches of layers of the block at work that follow no other, where any of them is missing."""
    for batch in batches:
        if any(layer.target.name not in records for layer in batch):
            for record in fit_together(run, batch):
                records[record.name] = record
                run.progress.fitted(record, len(records), len(run.plan.layers))


def following_batches(rows: CalibrationRows, model: Any) -> list[dict[str, Any]]:
    """Fitted rows that run through both models, as keyword arguments of either; each batch is a step of a refinement."""
    most = PACKED_ROWS if reads_packed(model.config) else OTHER_ROWS
    return list(rows.batches(rows.fitted[:most], model, size=BATCH_ROWS))


def _streams(run: FitRun) -> Streams:
    """The rows in front of the first block."""
    chain = run.chain()
    assert run.rows is not None
    assert chain is not None
    names = [layer.target.name for layer in run.plan.layers]
    paired = [layer.target.name for layer in run.plan.layers if _follows(run, layer)]
    return Streams(chain, following_batches(run.rows, chain.model), names, paired=paired)


def _regression(run: FitRun, streams: Streams, layer: LayerPlan) -> Regression:
    weight = run.source.read_finite(layer.weight)
    matrix = (weight.t() if layer.spec.fan_in_fan_out else weight).float()
    return regress(streams, layer.target.name, matrix, bias=layer.spec.bias)


def _refine(run: FitRun, streams: Streams, block: _Block, records: dict[str, LayerRecord]) -> dict[str, LayerRecord]:
    """Refine the block at work, round it to what is stored, and store it; returns the records of its layers."""
    layers = {layer.target.name: _converted(streams, layer) for layer in block.layers}
    vectors = _vectors(run, streams, block)
    trained = [parameter for layer in layers.values() for parameter in layer.parameters()] + list(vectors.values())
    seed = int.from_bytes(hashlib.sha256(f"{run.recipe.seed}:{block.name}".encode()).digest()[:6])
    change = refine_(streams, trained, epochs=run.recipe.fit.refine or 0, seed=seed)
    stored: dict[str, Tensor] = {}
    remeasured = {}
    for layer in block.layers:
        refined = layers[layer.target.name].to(getattr(torch, layer.stored_dtype))
        stored |= {f"{layer.prefix}.{part}": tensor for part, tensor in refined.state_dict().items()}
        name = layer.target.name
        remeasured[name] = measured_again(records[name], layer, refined, *dense_tensors(run, layer), moments_of(run, layer))
        refined.float()
    for name, vector in vectors.items():
        stored[name] = vector.to(getattr(torch, SAFETENSORS_DTYPES[run.source.tensors[name].dtype]))
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    entries = {name: asdict(record) for name, record in remeasured.items()}
    run.target.store_block(block.name, stored, {"layers": entries, **asdict(change)})
    return remeasured


def _converted(streams: Streams, layer: LayerPlan) -> SPMLinear:
    found = streams.block.get_submodule(streams.inner_name(layer.target.name))
    assert isinstance(found, SPMLinear)
    return found


def _vectors(run: FitRun, streams: Streams, block: _Block) -> dict[str, nn.Parameter]:
    """Norms and biases of the block at work beside its new layers, by their names in the checkpoint.

    One that the checkpoint has under another name, or in another shape, stays as it is.
    """
    replaced = tuple(f"{layer.target.name}." for layer in block.layers)
    # biases of experts that stay fused have no tensors of their own in the output
    source = restricted(run.source, {layer.weight for layer in run.plan.layers})
    names = StoredNames.of(skeleton(run.dense.config), source.tensors)
    found = {}
    for inner, parameter in streams.block.named_parameters():
        name = streams.full_name(inner)
        source_name = names.tensor(name)
        if parameter.dim() != 1 or name.startswith(replaced) or source_name is None:
            continue
        entry = source.tensors[source_name]
        if entry.shape == tuple(parameter.shape) and entry.dtype in SAFETENSORS_DTYPES:
            found[source_name] = parameter
    return found


@torch.no_grad()
def _put_back_(run: FitRun, streams: Streams, block: _Block) -> None:
    """Give the block at work what is stored of it, as it was rounded."""
    stored = partial(run.target.blocks.tensor, block.name)
    for layer in block.layers:
        converted = _converted(streams, layer)
        converted.load_state_dict({part: stored(f"{layer.prefix}.{part}") for part in converted.state_dict()})
    for name, parameter in _vectors(run, streams, block).items():
        parameter.copy_(stored(name))


@dataclass(frozen=True)
class Refined:
    """What refinement changed in the output.

    Attributes:
        blocks: name, and error before and after, of every block.
        places: block of every tensor that was trained, by its name in the output.
        vectors: norms and biases among these, which are not part of new layers.
    """

    blocks: dict[str, dict[str, float]]
    places: dict[str, str]
    vectors: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """What is recorded of a refined block: its error before and after, and its layers' records."""

    before: float
    after: float
    layers: dict[str, LayerRecord]


_FORM: TypeAdapter[_Change] = TypeAdapter(_Change)


def _change(record: dict[str, Any] | None) -> _Change:
    try:
        return _FORM.validate_python(record)
    except ValidationError:
        raise CorruptCheckpointError(
            "the record of a refined block is damaged; discard the unfinished run with --force"
        ) from None


def refined(run: FitRun) -> Refined:
    """What refinement changed, from what is stored; nothing where there is none."""
    found = Refined({}, {}, ())
    for block in _blocks(run) if run.recipe.fit.refine else ():
        record, names = run.target.blocks.record(block.name), run.target.blocks.keys(block.name)
        stored = _change(record)
        prefixes = tuple(f"{layer.prefix}." for layer in block.layers)
        vectors = tuple(name for name in names if not name.startswith(prefixes))
        change = {"before": stored.before, "after": stored.after}
        places = dict.fromkeys(names, block.name)
        found = Refined({**found.blocks, block.name: change}, {**found.places, **places}, (*found.vectors, *vectors))
    return found
