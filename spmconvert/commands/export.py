"""A plain dense checkpoint from a converted one, for any runtime: every SPM layer becomes the matrix it multiplies by.

The result loads without spmconvert and is as large as the source was. It computes what the converted model computes,
within ``TOLERANCE``; that is checked on a row of tokens before the output appears.

A layer fitted with calibration data has a bias even where the architecture has none. Some architectures have a switch
for it (``mlp_bias``, ``attention_bias``): it is turned on, and layers that the switch reaches and the conversion did
not get biases of zero. Where there is no switch the export is refused, because dropping the bias would change the
model.
"""

import gc
import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.converted import Converted, open_converted
from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.checkpoint.manifest import LayerSpec, dense_config
from spmconvert.checkpoint.places import check_apart, check_output
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.data.tokens import reads_tokens
from spmconvert.errors import FitError, OptionError, UnsupportedLayerError
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.fusing import Entry, fused_entries
from spmconvert.model.loading import load
from spmconvert.model.opening import open_, opened_names
from spmconvert.model.stored import stored_prefixes
from spmconvert.model.swap import layer_from_spec
from spmconvert.outputs.probe import first_output, token_batch
from spmconvert.plan.plan import DTYPE_BYTES
from spmconvert.version import __version__

FORMATS = ("dense",)
CHECKED_TOKENS = 16
# largest difference of an output, relative to the largest output, by the dtype of the model
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Export:
    """The result of ``export``.

    Attributes:
        output: the dense checkpoint.
        layers: number of layers that became dense again.
        bytes: bytes of its tensors.
        added_biases: switches of the config that were turned on to hold biases that the conversion added.
        difference: largest difference of an output relative to the largest output, None where the model reads no tokens.
        tolerance: what that may be at most.
    """

    output: Path
    layers: int
    bytes: int
    added_biases: tuple[str, ...]
    difference: float | None
    tolerance: float


def export(directory: str | Path, output: str | Path | None = None, *, form: str = "dense", force: bool = False) -> Export:
    """Write a dense checkpoint.

    Args:
        directory: output of a conversion or of a finetune.
        output: directory to write; None for the same name with ``-dense``.
        form: ``dense`` is the only one.
        force: replace an output that exists.

    Raises:
        OptionError: when the form is unknown, or the output is the converted checkpoint.
        UnsupportedLayerError: when a layer has a bias that the dense architecture has no place for.
        FitError: when the dense model does not compute the same.
        SpmconvertError: as ``convert`` does for checkpoints and outputs.
    """
    if form not in FORMATS:
        raise OptionError(f"format is {form!r}; choose one of {', '.join(FORMATS)}")
    converted = open_converted(Path(directory), recorded=False)
    source = converted.provenance["source"]["name"] if converted.provenance else None
    destination = Path(output) if output else Path(f"{converted.directory.resolve().name}-dense")
    # the source is not read, and yet it may be the only dense model there is
    check_apart(destination, {"input": converted.directory, "source": source})
    check_output(Path(os.path.realpath(destination)), force=force)
    config, switches = _dense_config(converted)
    tensors = _dense_tensors(converted, switches)
    size = sum(nbytes for _, nbytes, _ in tensors)
    hashed = hashlib.sha256(f"{converted.checkpoint().sha256()} {form} {__version__}".encode()).hexdigest()
    with OutputDirectory(
        destination, fingerprint=hashed, force=force, resume=False, needed_bytes=size, resumable=False
    ) as target:
        target.write_weights(tensors)
        target.add_text("config.json", json.dumps(config, indent=2) + "\n")
        target.add_text("README.md", _card(converted))
        for file in converted.checkpoint().companion_files():
            target.add_file(str(file.relative_to(converted.directory)), file)
        difference, tolerance = _difference(converted, target.final)
        if difference is not None and not difference <= tolerance:
            raise FitError(
                f"the dense model differs from {converted.directory} by {difference:.2g} of its largest output, "
                f"{tolerance:g} is allowed; run spmconvert verify on it"
            )
        target.commit()
    return Export(destination, len(converted.layers), size, switches, difference, tolerance)


def _dense_config(converted: Converted) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config without the layer map, with switches on for biases that the conversion added; and these switches."""
    config = dense_config(converted.config)
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
    """Name, bytes and reader of every dense tensor, each layer where its mark was."""
    source = converted.checkpoint()
    layers = {prefix: name for name, prefix in stored_prefixes(converted).items()}
    inside = tuple(f"{prefix}." for prefix in layers)
    tensors: list[Entry] = []
    for name, entry in converted.tensors.items():
        prefix, _, part = name.rpartition(".")
        if not name.startswith(inside):
            tensors.append((name, entry.nbytes, partial(source.read, name)))
        elif prefix in layers and part == "weight":
            tensors += _dense_layer(converted, prefix, converted.layers[layers[prefix]])
    tensors += _zero_biases(converted, switches, layers) if switches else []
    fused = {
        module: prefix.removesuffix(name.removeprefix(module))
        for prefix, name in layers.items()
        for module in opened_names([name])
    }
    return fused_entries(tensors, _dense_skeleton(converted, switches), fused) if fused else tensors


def _dense_layer(converted: Converted, prefix: str, spec: LayerSpec) -> list[Entry]:
    source, design = converted.checkpoint(), spec.design
    dtype = SAFETENSORS_DTYPES[converted.tensors[f"{prefix}.weight"].dtype]

    def matrix() -> Tensor:
        layer = layer_from_spec(spec).float()
        layer.load_state_dict({part: source.read(f"{prefix}.{part}") for part in layer.state_dict()})
        with torch.no_grad():
            dense = layer.to_dense()
        return (dense.t() if spec.fan_in_fan_out else dense).to(getattr(torch, dtype))

    entries: list[Entry] = [(f"{prefix}.weight", DTYPE_BYTES[dtype] * design.in_features * design.out_features, matrix)]
    if spec.bias:
        held = f"{prefix}.{design.bias_name}"
        entries.append((f"{prefix}.bias", converted.tensors[held].nbytes, partial(source.read, held)))
    return entries


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


def _difference(converted: Converted, dense: Path) -> tuple[float | None, float]:
    """Largest difference of the outputs of both models on a row of tokens, relative to the largest, and its limit."""
    outputs = []
    for directory in (converted.directory, dense):
        model = load(directory, dtype="auto").eval()
        limit = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
        if not reads_tokens(model.config):
            return None, limit
        outputs.append(first_output(model, token_batch(model, CHECKED_TOKENS)["input_ids"]))
        # one model at a time
        del model
        gc.collect()
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()), limit


def _card(converted: Converted) -> str:
    name = converted.directory.resolve().name
    return (
        f"# {name}, dense\n\nWritten by spmconvert {__version__} from the converted checkpoint `{name}`: every SPM layer\n"
        "as the dense matrix it multiplies by. It computes what that checkpoint computes and loads without spmconvert.\n"
    )
