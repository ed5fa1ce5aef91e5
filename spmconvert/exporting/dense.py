"""A plain dense checkpoint from a converted one, for any runtime: every SPM layer becomes the matrix it multiplies by.

The result loads without spmconvert and is as large as the source was. It computes what the converted model computes,
within ``TOLERANCE``; that is checked on a row of tokens before the output appears.

A layer fitted with calibration data has a bias even where the architecture has none. Some architectures have a switch
for it (``mlp_bias``, ``attention_bias``): it is turned on, and layers that the switch reaches and the conversion did
not get biases of zero. Where there is no switch the export is refused, because dropping the bias would change the
model.
"""

import json
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import UnsupportedLayerError
from spmconvert.exporting.comparison import compare_loaded
from spmconvert.exporting.form import Written, add_companions, card, plain_config
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.fusing import Entry, fused_entries
from spmconvert.model.loading import load
from spmconvert.model.opening import open_, opened_names
from spmconvert.model.stored import stored_prefixes
from spmconvert.model.swap import layer_from_spec
from spmconvert.plan.plan import DTYPE_BYTES

_CARD = (
    "every SPM layer as the dense matrix it\nmultiplies by. It computes what that checkpoint computes and loads without "
    "spmconvert."
)


class Dense:
    """The dense form of a converted checkpoint.

    Raises:
        UnsupportedLayerError: when a layer has a bias that the dense architecture has no place for.
    """

    def __init__(self, converted: Converted) -> None:
        self.converted = converted
        self.config, self.switches = _dense_config(converted)

    @cached_property
    def tensors(self) -> list[Entry]:
        """Name, bytes and reader of every tensor."""
        return _dense_tensors(self.converted, self.switches)

    @property
    def needed_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes for _, nbytes, _ in self.tensors)

    def write(self, target: OutputDirectory) -> Written:
        """Write and compare."""
        converted = self.converted
        target.write_weights(self.tensors)
        target.add_text("config.json", json.dumps(self.config, indent=2) + "\n")
        target.add_text("README.md", card(converted, "dense", _CARD))
        add_companions(converted, target)
        comparison = compare_loaded(
            converted.directory,
            lambda: load(converted.directory, dtype="auto"),
            lambda: load(target.final, dtype="auto"),
        )
        return Written(self.needed_bytes, comparison, self.switches)


def _dense_config(converted: Converted) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config without the layer map, with switches on for biases that the conversion added; and these switches."""
    config = plain_config(converted)
    missing = set(_layers_without_bias(converted, ()))
    if not missing:
        return config, ()
    chosen: list[str] = []
    for switch in sorted(key for key, value in load_config(converted.directory).to_dict().items() if value is False):
        if not switch.endswith("bias"):
            continue
        left = set(_layers_without_bias(converted, (*chosen, switch)))
        if left < missing:
            chosen.append(switch)
            missing = left
    if missing:
        raise UnsupportedLayerError(
            f"{len(missing)} layers, for example {min(missing)}, got a new bias that "
            f"{config['architectures'][0]} has no place for; use the converted checkpoint itself, or "
            "convert without --new-bias to export it"
        )
    return {**config, **dict.fromkeys(chosen, True)}, tuple(chosen)


def _layers_without_bias(converted: Converted, switches: tuple[str, ...]) -> list[str]:
    """Layers whose bias the dense architecture has no place for, with some switches of its config on."""
    model = _dense_skeleton(converted, switches)
    return [
        name
        for name, spec in converted.layers.items()
        if spec.bias and getattr(model.get_submodule(name), "bias", None) is None
    ]


def _dense_skeleton(converted: Converted, switches: tuple[str, ...]) -> Any:
    config = load_config(converted.directory)
    for switch in switches:
        setattr(config, switch, True)
    model = skeleton(config)
    open_(model)
    return model


def _dense_tensors(converted: Converted, switches: tuple[str, ...]) -> list[Entry]:
    """Name, bytes and reader of every dense tensor, each layer where its mark was, before experts are fused again."""
    source, stored = converted.checkpoint(), stored_prefixes(converted)
    entries = {prefix: entry for entry, prefix in stored.items()}
    layers = _single_prefixes(converted, stored)
    around = {
        module: prefix.removesuffix(name.removeprefix(module))
        for prefix, name in layers.items()
        for module in opened_names([name])
    }
    model = _dense_skeleton(converted, switches) if around else None
    left = _left_dense(model, around)
    inside = tuple(f"{prefix}." for prefix in entries)
    tensors: list[Entry] = []
    for name, entry in converted.tensors.items():
        prefix, _, part = name.rpartition(".")
        if name.startswith(inside):
            if prefix in entries and part == "weight":
                tensors += _dense_layers(converted, prefix, converted.entries[entries[prefix]])
        elif name in left:
            size = entry.nbytes // len(left[name])
            tensors += [(own, size, partial(source.read_part, name, index)) for index, own in enumerate(left[name])]
        else:
            tensors.append((name, entry.nbytes, partial(source.read, name)))
    tensors += _zero_biases(converted, switches, layers) if switches else []
    return fused_entries(tensors, model, around) if around else tensors


def _single_prefixes(converted: Converted, stored: dict[str, str]) -> dict[str, str]:
    """Layers by what the checkpoint calls them, or would call those of experts if they were not stacked."""
    return {
        prefix: name
        for entry, spec in converted.entries.items()
        for prefix, name in zip(spec.names(stored[entry]), spec.names(entry), strict=True)
    }


def _left_dense(model: Any, around: dict[str, str]) -> dict[str, list[str]]:
    """Tensors of experts' projections that may be stacked beside replaced ones, and the names of their parts."""
    found: dict[str, list[str]] = {}
    for module, prefix in around.items():
        opened = model.get_submodule(module)
        for part in (part for part in opened.parts if opened.stacks and not part.idle):
            found.setdefault(f"{prefix}.{part.name.partition('.')[2]}", []).append(f"{prefix}.{part.name}")
    return found


def _dense_layers(converted: Converted, prefix: str, spec: LayerSpec) -> Iterator[Entry]:
    """Weight, and bias where there is one, of a layer or of all experts that an entry stands for."""
    source, design = converted.checkpoint(), spec.design
    dtype = SAFETENSORS_DTYPES[converted.tensors[f"{prefix}.weight"].dtype]

    def read(part: str, index: int) -> Tensor:
        name = f"{prefix}.{part}"
        return source.read(name) if spec.experts is None else source.read_part(name, index)

    def matrix(index: int) -> Tensor:
        layer = layer_from_spec(spec).float()
        layer.load_state_dict({part: read(part, index) for part in layer.state_dict()})
        with torch.no_grad():
            dense = layer.to_dense()
        return (dense.t() if spec.fan_in_fan_out else dense).to(getattr(torch, dtype))

    for index, name in enumerate(spec.names(prefix)):
        yield f"{name}.weight", DTYPE_BYTES[dtype] * design.in_features * design.out_features, partial(matrix, index)
        if spec.bias:
            held = design.bias_name
            size = converted.tensors[f"{prefix}.{held}"].nbytes // (spec.experts or 1)
            yield f"{name}.bias", size, partial(read, held, index)


def _zero_biases(converted: Converted, switches: tuple[str, ...], layers: dict[str, str]) -> list[Entry]:
    """Biases that a switch adds beside those that it was turned on for."""
    plain = {name for name, _ in _dense_skeleton(converted, ()).named_parameters()}
    stored = {name: prefix for prefix, name in layers.items()}
    prefix, name = next(iter(layers.items()))
    # the stored names have or lack the same base model's prefix everywhere
    extra, lacking = prefix.removesuffix(name), name.removesuffix(prefix)
    dtype = getattr(torch, SAFETENSORS_DTYPES[converted.tensors[f"{prefix}.weight"].dtype])
    entries: list[Entry] = []
    for parameter, value in _dense_skeleton(converted, switches).named_parameters():
        layer = parameter.rpartition(".")[0]
        if parameter in plain or (layer in stored and converted.layers[layer].bias):
            continue
        zeros = partial(torch.zeros, tuple(value.shape), dtype=dtype)
        entries.append((extra + parameter.removeprefix(lacking), value.numel() * dtype.itemsize, zeros))
    return entries
