"""How a checkpoint that carries its own code loads: a config and a model class mixed into those of transformers.

This source goes into the checkpoint beside that of the layers (``exporting/source``), so it imports nothing but torch and
what goes with it. The classes that are made of it keep the names of those of transformers, since renamings, tokenizers and
pipelines are found by them. In config.json alone the model type is another one: so a program that is not allowed to run the
code, and would draw the replaced layers at random, is told by transformers that it needs to.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from spmconvert.checkpoint.names import resolve_name
from spmconvert.model.places import modules_around, put_module
from spmconvert.operator.plain import PlainLayer

# before the model type in config.json
FOREIGN = "spm_"


class PortableConfig:
    """Mixed into a config: the model type in the file is one that transformers does not know."""

    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, *arguments: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of a file, with the model type of the architecture."""
        entries, unused = super().get_config_dict(*arguments, **options)  # type: ignore[misc]
        if entries.get("model_type") == FOREIGN + cls.model_type:
            entries["model_type"] = cls.model_type
        return entries, unused

    def to_json_string(self, *arguments: Any, **options: Any) -> str:
        """The text of a file."""
        entries = json.loads(super().to_json_string(*arguments, **options))  # type: ignore[misc]
        entries["model_type"] = FOREIGN + self.model_type
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"


class PortableModel:
    """Mixed into a model: layers that the config names are built as they were converted.

    Attributes:
        term_forms: what builds a term, by its name in the config.
    """

    term_forms: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        replace_layers(self, config.spm_layers, self.term_forms)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether tensors have names of their own in files; these have those of the architecture, old ones too."""
        return False

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As always, but a replaced layer that the files lack is an error."""
        model, found = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PlainLayer))
        lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        drawn = sorted(name for name in lacking if name.startswith(layers))
        if drawn:
            raise ValueError(f"{drawn[0]} is missing from the checkpoint or has another shape; download it again")
        return (model, found) if output_loading_info else model


def replace_layers(
    model: Any, layers: Mapping[str, Mapping[str, Any]], term_forms: Mapping[str, Callable[..., nn.Module]]
) -> None:
    """Put layers in the place of dense ones; a base model that lacks some of them gets the others.

    Args:
        model: of transformers, dense.
        layers: sizes, bias, dtype and terms by the name of the layer.
        term_forms: what builds a term, by the name that stands there.

    Raises:
        ValueError: when the model has none of the layers.
    """
    modules = dict(model.named_modules())
    found = {name: resolve_name(name, modules, model.base_model_prefix) for name in layers}
    if not any(found.values()):
        raise ValueError(f"{type(model).__name__} has none of the {len(layers)} converted layers of config.json")
    for name, module in found.items():
        if module is None:
            continue
        entry = layers[name]
        sizes = (entry["in"], entry["out"])
        dtype = getattr(torch, entry["dtype"]) if entry["dtype"] else None
        terms = {kind: term_forms[form](*sizes, **numbers, dtype=dtype) for kind, (form, numbers) in entry["terms"].items()}
        parent, _, child = module.rpartition(".")
        put_module(model.get_submodule(parent), child, PlainLayer(*sizes, entry["bias"], terms, dtype))
        for around in modules_around(model, module):
            # transformers would reach for the weights of the layer inside to draw fresh ones
            around._is_hf_initialized = True  # type: ignore[assignment]
