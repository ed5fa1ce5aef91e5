"""Building SPM layers from a layer map and putting them in the place of dense ones.

Names in a map are those of the architecture the checkpoint was converted as. The same weights are also loaded under other
heads, where every name gains or loses the base model's prefix, so names are resolved both ways.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spmconvert.checkpoint.manifest import LayerSpec, single_layers
from spmconvert.checkpoint.names import resolve_name, stacked_name
from spmconvert.errors import CheckpointError
from spmconvert.model.experts import OpenedExperts
from spmconvert.model.opened_module import OpenedModule
from spmconvert.model.opening import close_, open_, opened_names
from spmconvert.model.places import put_module
from spmconvert.model.stacked_experts import StackedExperts
from spmconvert.operator.linear import SPMLinear


def copy_sharing_tensors(model: Any) -> Any:
    """Modules of their own, parameters and buffers of the model: what is replaced in one is not in the other."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def as_it_runs(model: Any) -> Any:
    """A dense model as transformers runs it, for timing: itself where nothing was opened, else a copy with that fused."""
    if not any(isinstance(module, OpenedModule) for module in model.modules()):
        return model
    fused = copy_sharing_tensors(model)
    close_(fused)
    return fused.eval().requires_grad_(False)


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the module of that name."""
    parent, _, child = name.rpartition(".")
    put_module(model.get_submodule(parent), child, layer)


def stack_(model: nn.Module) -> None:
    """Stack all opened experts of a model that have converted layers, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, OpenedExperts) and any(isinstance(layer, SPMLinear) for layer in module.modules()):
            replace_module(model, name, StackedExperts(module))


def unstack_(model: nn.Module) -> None:
    """Give all stacked experts of a model one layer an expert again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StackedExperts):
            replace_module(model, name, module.opened())


def layer_from_spec(spec: LayerSpec, *, device: torch.device | str | None = None) -> SPMLinear:
    """One SPM layer of the given shape with fresh parameters, in the default dtype unless the spec pins one."""
    design = spec.design
    dtype = None if spec.dtype is None else getattr(torch, spec.dtype)
    return SPMLinear(design.in_features, design.out_features, spec.bias, terms=design.terms, device=device, dtype=dtype)


@torch.no_grad()
def dense_layer(layer: SPMLinear, *, conv1d: bool, dtype: torch.dtype) -> nn.Module:
    """The dense layer that computes what an SPM layer does.

    Args:
        layer: on any device.
        conv1d: give transformers' Conv1D, whose weight is transposed, in place of nn.Linear.
        dtype: of the result.
    """
    from transformers.pytorch_utils import Conv1D

    weight, bias = layer.to_dense(), layer.held_bias
    if conv1d:
        dense = Conv1D(layer.out_features, layer.in_features)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    dense = dense.to(device=weight.device, dtype=dtype)
    dense.weight.copy_(weight.t() if conv1d else weight)
    if bias is not None:
        dense.bias.copy_(bias)
    found: nn.Module = dense.train(layer.training)
    return found


def swap_layers(model: nn.Module, specs: Mapping[str, LayerSpec]) -> list[str]:
    """Replace every layer of the map that the model has, in place; experts that are named are opened for it, and stacked.

    Returns:
        The names of the replaced modules in this model. A base model that lacks part of a map (a decoder loaded alone,
        say) gets the rest.

    Raises:
        CheckpointError: when the model has none of the layers, one of another shape, or another number of experts.
    """
    replaced = []
    prefix = getattr(model, "base_model_prefix", "")
    open_(model, opened_names(single_layers(specs)))
    modules = dict(model.named_modules())
    for entry, spec in specs.items():
        found = [resolve_name(name, modules, prefix) for name in spec.names(entry)]
        names = [name for name in found if name is not None]
        if not names:
            continue
        _check_experts(entry, spec, modules, names)
        layer = None
        for name in names:
            dense = model.get_submodule(name)
            device = next((p.device for p in dense.parameters()), None)
            check_shape(name, dense, spec)
            # without memory one stands for all experts, of which there may be thousands
            if layer is None or device is None or device.type != "meta":
                layer = layer_from_spec(spec, device=device).train(dense.training)
            replace_module(model, name, layer)
        replaced.append(names[0] if spec.experts is None else stacked_name(names[0]))
    stack_(model)
    if specs and not replaced:
        raise CheckpointError(
            f"{type(model).__name__} has none of the {len(specs)} converted layers, for example {next(iter(specs))!r}; "
            "load the architecture that was converted"
        )
    return replaced


def _check_experts(entry: str, spec: LayerSpec, modules: Mapping[str, nn.Module], names: list[str]) -> None:
    """Compare the number of experts that an entry stands for with that of the model.

    Raises:
        CheckpointError: when it is another one, or the entry is one of a single expert.
    """
    around = modules.get(names[0].rpartition(".")[0].rpartition(".")[0])
    count = len(around.experts) if isinstance(around, OpenedExperts) else None
    if spec.experts is None and count is not None:
        raise CheckpointError(
            f"the layer map has {entry} for one expert by itself, as it was written before experts were stacked; convert "
            "the source again"
        )
    if spec.experts != count:
        raise CheckpointError(
            f"the layer map has {spec.experts} experts for {entry}, and the model has {count}; config.json was changed"
        )


def check_shape(name: str, dense: nn.Module, spec: LayerSpec) -> None:
    """Compare a dense module with the spec that is to replace it.

    Raises:
        CheckpointError: when the shapes differ.
    """
    expected = (spec.design.out_features, spec.design.in_features)
    shape = tuple(getattr(dense, "weight", torch.empty(0)).shape)
    if spec.fan_in_fan_out:
        shape = shape[::-1]
    if shape != expected:
        raise CheckpointError(
            f"layer {name} is {shape} in the model and {expected} in the layer map; config.json was changed"
        )
