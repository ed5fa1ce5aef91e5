"""Parameters, bytes and FLOPs, before and after, from headers and integers; no weight is read.

FLOPs are those of linear layers for one token, two for a multiply and an add. Attention scores are not counted, because
they depend on the length of the text and no conversion changes them. An expert counts by the share of the tokens that are
given to one of its layer; parameters that a token meets are counted beside all of them where a model has experts.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.headers import TensorEntry
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.model.architecture import skeleton
from spmconvert.model.opened_module import MARK_SHAPE
from spmconvert.model.opening import open_
from spmconvert.model.stored import stored_prefixes
from spmconvert.plan.structure import Linear, find_linears
from spmconvert.reporting.schema import Layer, Quantity


def replaced_layers(converted: Converted, config: Any) -> tuple[Layer, ...]:
    """The layer map with what the conversion recorded about each layer."""
    shares = {linear.name: linear.share for linear in _linears(config)}
    records = {record["name"]: record for record in converted.provenance["layers"]}
    layers = []
    for name, spec in converted.layers.items():
        design, record = spec.design, records[name]
        layers.append(
            Layer(
                name=name,
                in_features=design.in_features,
                out_features=design.out_features,
                design=design.describe(),
                dense_parameters=record["dense_parameters"],
                parameters=record["parameters"],
                dense_flops=round(2 * shares.get(name, 1.0) * design.in_features * design.out_features),
                flops=round(shares.get(name, 1.0) * design.flops_per_token()),
                error=record["error"],
                baseline_error=record["baseline_error"],
                baseline_rank=record["baseline_rank"],
            )
        )
    return tuple(layers)


def quantities(
    converted: Converted, source: Checkpoint | None, config: Any, layers: tuple[Layer, ...]
) -> tuple[Quantity, ...]:
    """Parameters, FLOPs and bytes of the replaced layers and of the whole model."""
    replaced, whole = "replaced layers", "whole model"
    recorded = converted.provenance
    inside = tuple(f"{prefix}." for prefix in stored_prefixes(converted).values())
    others = {name: entry.shape for name, entry in converted.tensors.items() if not name.startswith(inside)}
    # the marks of opened experts are no parameters
    after = sum(math.prod(shape) for shape in others.values() if shape != MARK_SHAPE)
    after += sum(spec.parameter_count() for spec in converted.layers.values())
    flops = sum(layer.flops for layer in layers)
    dense_flops = sum(layer.dense_flops for layer in layers)
    linears = _linears(config)
    all_flops = sum(round(2 * linear.share * linear.in_features * linear.out_features) for linear in linears)
    counted = "linear layers, attention scores not counted"

    def amount(what: str, unit: str, scope: str, numbers: tuple[int, int], note: str = "") -> Quantity:
        return Quantity(what=what, unit=unit, scope=scope, dense=numbers[0], converted=numbers[1], note=note)

    whole_parameters = recorded["parameters"]["before"], after
    own_parameters = sum(layer.dense_parameters for layer in layers), sum(layer.parameters for layer in layers)
    return (
        amount("parameters", "", replaced, own_parameters),
        amount("parameters", "", whole, whole_parameters),
        *(amount("parameters that a token meets", "", *active) for active in _active(linears, layers, whole_parameters)),
        amount("FLOPs per token", "", replaced, (dense_flops, flops), counted),
        amount("FLOPs per token", "", whole, (all_flops, all_flops - dense_flops + flops), counted),
        _bytes_on_disk(converted, source),
    )


def _linears(config: Any) -> list[Linear]:
    """All linear layers of a model, those of experts one by one."""
    model = skeleton(config)
    open_(model)
    return find_linears(model)


def _active(
    linears: list[Linear], layers: tuple[Layer, ...], whole: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Scope, and parameters before and after that a token meets; nothing for a model without experts."""
    resting = {linear.name: 1 - linear.share for linear in linears if linear.group}
    if not resting:
        return
    idle = [(resting.get(layer.name, 0.0), layer.dense_parameters, layer.parameters) for layer in layers]
    before, after = (sum(layer.dense_parameters for layer in layers), sum(layer.parameters for layer in layers))
    own = round(sum(share * dense for share, dense, _ in idle)), round(sum(share * left for share, _, left in idle))
    yield "replaced layers", (before - own[0], after - own[1])
    converted = {layer.name for layer in layers}
    other = sum(
        resting[linear.name] * (linear.in_features + linear.bias) * linear.out_features
        for linear in linears
        if linear.group and linear.name not in converted
    )
    yield "whole model", (whole[0] - round(own[0] + other), whole[1] - round(own[1] + other))


def _bytes_on_disk(converted: Converted, source: Checkpoint | None) -> Quantity:
    after = _file_bytes(converted.tensors)
    if source is None:
        before, note = (
            converted.provenance["bytes"]["before"],
            "dense: tensors as the conversion recorded them, no files found",
        )
    else:
        before, note = _file_bytes(source.tensors), "weight files"
    return Quantity(what="bytes on disk", unit="B", scope="whole model", dense=before, converted=after, note=note)


def _file_bytes(tensors: dict[str, TensorEntry]) -> int:
    files: set[Path] = {entry.file for entry in tensors.values()}
    return sum(file.stat().st_size for file in files)
