"""Parameters, bytes and FLOPs, before and after, from headers and integers; no weight is read.

FLOPs are those of linear layers for one token, two for a multiply and an add. Attention scores are not counted, because
they depend on the length of the text and no conversion changes them. Every linear layer counts once, so a mixture of
experts is counted as if all of its experts ran.
"""

import math
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.headers import TensorEntry
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.model.architecture import skeleton
from spmconvert.model.stored import stored_prefixes
from spmconvert.plan.structure import find_linears
from spmconvert.reporting.schema import Layer, Quantity


def replaced_layers(converted: Converted) -> tuple[Layer, ...]:
    """The layer map with what the conversion recorded about each layer."""
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
                dense_flops=2 * design.in_features * design.out_features,
                flops=design.flops_per_token(),
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
    after = sum(math.prod(entry.shape) for name, entry in converted.tensors.items() if not name.startswith(inside))
    after += sum(spec.parameter_count() for spec in converted.layers.values())
    flops = sum(layer.flops for layer in layers)
    dense_flops = sum(layer.dense_flops for layer in layers)
    all_flops = sum(2 * linear.in_features * linear.out_features for linear in find_linears(skeleton(config)))
    counted = "linear layers, attention scores not counted"

    def amount(what: str, unit: str, scope: str, numbers: tuple[int, int], note: str = "") -> Quantity:
        return Quantity(what=what, unit=unit, scope=scope, dense=numbers[0], converted=numbers[1], note=note)

    own_parameters = sum(layer.dense_parameters for layer in layers), sum(layer.parameters for layer in layers)
    return (
        amount("parameters", "", replaced, own_parameters),
        amount("parameters", "", whole, (recorded["parameters"]["before"], after)),
        amount("FLOPs per token", "", replaced, (dense_flops, flops), counted),
        amount("FLOPs per token", "", whole, (all_flops, all_flops - dense_flops + flops), counted),
        _bytes_on_disk(converted, source),
    )


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
