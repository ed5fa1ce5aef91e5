"""How int8 parameters stand in safetensors files: in their parts, as torchao names them, described in the files' metadata.

``encoder.weight`` becomes ``encoder._weight_qdata`` and ``encoder._weight_scale``. torchao cuts them up and transformers
puts them together, as for its own quantised checkpoints.
"""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spmconvert.errors import CheckpointError
from spmconvert.model.int8 import set_mode_
from spmconvert.operator.int8 import Int8Mode, is_int8

# of an int8 tensor; a zero point stands where torchao itself quantised
PARTS = ("qdata", "scale", "zero_point")


def read_metadata(files: Sequence[str]) -> dict[str, str]:
    """What the files say about their tensors, together."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            own = opened.metadata() or {}
        names += json.loads(own.get("tensor_names", "[]"))
        found |= own
    return {**found, "tensor_names": json.dumps(sorted(set(names)))}


def stored_parts(metadata: dict[str, str]) -> dict[str, list[str]]:
    """Last names of int8 parameters, with those of their parts."""
    names = json.loads(metadata["tensor_names"])
    kinds = {name: json.loads(metadata[name])["_type"] for name in names}
    last = sorted({name.rpartition(".")[2] for name, kind in kinds.items() if kind != "Tensor"})
    return {name: [f"_{name}_{part}" for part in PARTS] for name in last}


def stored_form(model: nn.Module, mode: Int8Mode | None) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """State dict and metadata to write; None for the model's own state dict.

    Args:
        model: to be saved.
        mode: as its config says that it was quantised.

    Raises:
        CheckpointError: when something else has quantised it.
    """
    quantised = next((name for name, parameter in model.named_parameters() if is_int8(parameter)), None)
    if quantised is None:
        return None, {}
    if mode is None:
        raise CheckpointError(
            f"{quantised} was quantised by torchao itself, which leaves terms of converted layers out; quantise the model "
            "by spmconvert.quantize_ to save it"
        )
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    return tensors, metadata


def mark_loaded_(model: Any, mode: Int8Mode | None) -> None:
    """Tell the layers of a loaded model that it is quantised, in place.

    Args:
        model: with all its tensors.
        mode: as its config says; None for floating point.
    """
    if mode is None:
        return
    set_mode_(model, mode)
    # transformers would turn these around when it saves, and they have no other way
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
    ]
