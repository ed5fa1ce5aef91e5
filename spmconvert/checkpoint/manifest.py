"""What a converted checkpoint says about itself: the layer map in config.json and the provenance in spm.json.

The layer map is all that is needed to rebuild the layers, so that nothing is derived from tensor shapes and a file that
disagrees with its map is found out. It is plain JSON, because transformers copies it through its own config classes.
Experts have one entry a projection: ``model.layers.0.mlp.experts.down`` with ``"experts": 8`` stands for the layers
``model.layers.0.mlp.experts.0.down`` to ``.7.down``, whose tensors are stored stacked under the entry's name.
This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spmconvert.checkpoint.names import expert_names
from spmconvert.errors import CheckpointError, OptionError
from spmconvert.operator.design import Design
from spmconvert.version import __version__

QUANT_METHOD = "spm"
FORMAT_VERSION = 2
# how a model was quantised after its conversion; no key where it was not
INT8_KEY = "int8"
PROVENANCE_FILE = "spm.json"
CHECKSUM_FILE = "checksums.sha256"
# names the weight file for transformers, which raises where it names none: before anything is loaded, with this as its last
# words. Importing spmconvert takes it off; save_pretrained never writes the key
GUARD_KEY = "transformers_weights"
GUARD = "spmconvert: pip install spmconvert, and import spmconvert before this checkpoint is loaded"
# what a report leaves beside the weights; it describes these weights and no others
REPORT_FILES = ("report.json", "report.html")
LAYER_KEYS = ("in", "out", "terms", "bias", "fan_in_fan_out", "dtype")
# of an entry that stands for all experts of a projection, which others lack
EXPERTS_KEY = "experts"
MOST_EXPERTS = 1 << 16
DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the layer map.

    Attributes:
        design: sizes and terms of the layer.
        bias: whether the layer has a bias.
        fan_in_fan_out: whether the dense layer stored its weight as [in_features, out_features] (Conv1D).
        dtype: dtype that the layer keeps whatever the rest of the model is loaded in; None follows the model.
        experts: how many layers of this design, one an expert, are stacked; None for a layer by itself.
    """

    design: Design
    bias: bool
    fan_in_fan_out: bool = False
    dtype: str | None = None
    experts: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        sizes = (self.design.in_features, self.design.out_features)
        values = (*sizes, self.design.to_json(), self.bias, self.fan_in_fan_out, self.dtype)
        entry = dict(zip(LAYER_KEYS, values, strict=True))
        return entry if self.experts is None else {**entry, EXPERTS_KEY: self.experts}

    @classmethod
    def from_json(cls, name: str, entry: object) -> "LayerSpec":
        """Read an entry back.

        Raises:
            CheckpointError: when a key is missing or unknown, or the numbers do not describe a layer.
        """
        if not isinstance(entry, dict) or set(entry) - {EXPERTS_KEY} != set(LAYER_KEYS):
            content = sorted(entry) if isinstance(entry, dict) else entry
            raise CheckpointError(f"layer {name} in quantization_config has {content}; it needs {sorted(LAYER_KEYS)}")
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"layer {name} in quantization_config has dtype {entry['dtype']!r}; known are {DTYPES}")
        for key in ("bias", "fan_in_fan_out"):
            if not isinstance(entry[key], bool):
                raise CheckpointError(f"layer {name} in quantization_config has {key} {entry[key]!r}; it is true or false")
        try:
            design = Design.from_json(_size(entry, "in"), _size(entry, "out"), entry["terms"])
            experts = _size(entry, EXPERTS_KEY) if EXPERTS_KEY in entry else None
            if experts is not None and experts > MOST_EXPERTS:
                raise OptionError(f"{EXPERTS_KEY} is {experts:,}; at most {MOST_EXPERTS:,} are read")
        except OptionError as error:
            raise CheckpointError(f"layer {name} in quantization_config describes no layer: {error}") from None
        return cls(design, entry["bias"], entry["fan_in_fan_out"], entry["dtype"], experts)

    def names(self, name: str) -> list[str]:
        """The layers that an entry of this name stands for: itself, or one an expert."""
        return [name] if self.experts is None else expert_names(name, self.experts)

    def parameter_count(self) -> int:
        """Number of parameters of one layer, bias included."""
        return self.design.parameter_count(bias=self.bias)

    def stored_bytes(self, item_bytes: int) -> int:
        """Bytes of one layer's tensors in a file, stored in a dtype of ``item_bytes``."""
        return self.design.stored_bytes(item_bytes, bias=self.bias)


def _size(entry: dict[str, Any], key: str) -> int:
    value = entry[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{key} is {value!r}; it must be an integer of at least 1")
    return value


def single_layers(entries: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """A layer map with every layer by itself, those of experts too."""
    return {name: replace(spec, experts=None) for entry, spec in entries.items() for name in spec.names(entry)}


def stacked_layers(layers: Mapping[str, LayerSpec], groups: Mapping[str, str]) -> dict[str, LayerSpec]:
    """The inverse: one entry for all experts of a projection.

    Args:
        layers: by name; those of a group have one design.
        groups: the experts and the projection that a layer belongs to, empty for a layer by itself.
    """
    counts: dict[str, int] = {}
    for name in layers:
        counts[groups[name]] = counts.get(groups[name], 0) + 1
    return {
        groups[name] or name: replace(spec, experts=counts[groups[name]] if groups[name] else None)
        for name, spec in layers.items()
    }


def quantization_config(layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """What config.json carries about replaced layers, as plain JSON values."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "spmconvert_version": __version__,
        "layers": {name: spec.to_json() for name, spec in layers.items()},
    }


def converted_config(config: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """config.json of a converted checkpoint, from that of its source."""
    return {**config, "quantization_config": quantization_config(layers), GUARD_KEY: GUARD}


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what a conversion adds."""
    own = {"quantization_config", *({GUARD_KEY} if config.get(GUARD_KEY) == GUARD else ())}
    return {key: value for key, value in config.items() if key not in own}


def check_format_version(version: object) -> None:
    """Refuse a checkpoint written in another format.

    Raises:
        CheckpointError: when the version is not one this package reads.
    """
    if version == 1:
        raise CheckpointError(
            "the checkpoint has format_version 1, which was never released and is not read; convert its source again"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format_version {version!r}, this spmconvert reads {FORMAT_VERSION}; upgrade spmconvert"
        )
