"""Quantising a converted model to int8, every term of its layers included, and back.

Dense layers and low-rank terms are ordinary ``nn.Linear`` and quantised by torchao, as transformers does it: heads and tied
weights stay in floating point. Factors of the other terms become torchao's tensors, too. Embeddings, norms, biases,
diagonals and fused experts stay what they are; ``quantize_`` names every matrix that it left. Stacked experts are quantised
each by itself, and run one after the other.
"""

from typing import Any

import torch
from torch import nn

from spmconvert.errors import OptionError, UnsupportedLayerError
from spmconvert.model.stacked_experts import is_converted
from spmconvert.model.stacked_layer import StackedLayer
from spmconvert.model.swap import replace_module
from spmconvert.operator.int8 import INT8_MODES, Int8Mode, check_torchao, config_of, is_int8, numbers, quantised
from spmconvert.operator.kept import Keeper
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.module import TermModule


@torch.no_grad()
def quantize_(model: Any, mode: Int8Mode) -> list[str]:
    """Quantise a converted model, in place; ``save_pretrained`` writes it, and ``from_pretrained`` loads it.

    Args:
        model: a transformers model with converted layers, whole and in floating point.
        mode: ``int8-weight-only``, or ``int8-dynamic``: activations of every token as well.

    Returns:
        Names of the parameters with two or more axes that stay in floating point.

    Raises:
        OptionError: when the mode is unknown, torchao is missing, or the model is none of these.
        UnsupportedLayerError: when a term has no such form; nothing is changed then.
    """
    if mode not in INT8_MODES:
        raise OptionError(f"int8 mode is {mode!r}; choose one of {', '.join(INT8_MODES)}")
    check_torchao()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SPMLinear)}
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, StackedLayer)}
    if not any(map(is_converted, model.modules())):
        raise OptionError(f"{type(model).__name__} has no converted layer; quantise dense models by torchao itself")
    _check_tensors(model)
    for name, layer in layers.items():
        _check_terms(name, layer, mode)
    for name, stack in stacks.items():
        _check_terms(name, stack.template, mode)
    quantize_linears_(model, mode)
    for stack in stacks.values():
        _quantize_stack_(stack, mode)
    for layer in layers.values():
        layer.drop_cache_()
        for term in _terms(layer):
            for factor, apart in (term.int8_factors or {}).items():
                value = getattr(term, factor)
                # torchao takes a slice of one number for something else, and it would be larger
                if value.numel() and value.shape[apart:].numel() > 1:
                    setattr(term, factor, nn.Parameter(quantised(value, mode, apart), requires_grad=False))
    set_mode_(model, mode)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config.int8 = mode
        model.is_quantized = True
    stacked = {f"{name}.{part}" for name, stack in stacks.items() for part, _ in stack.named_parameters()}
    left = {name: parameter for name, parameter in model.named_parameters() if not is_int8(parameter)}
    return [name for name, parameter in left.items() if parameter.dim() > 1 + (name in stacked)]


def _quantize_stack_(stack: StackedLayer, mode: Int8Mode) -> None:
    """The same for the layers of all experts of a projection, each by itself."""
    stack.drop_cache_()
    for owner, module in stack.template.named_modules():
        factors = {"weight": 1} if isinstance(module, nn.Linear) else getattr(module, "int8_factors", None) or {}
        holder = stack.get_submodule(owner)
        for factor, apart in factors.items():
            value = getattr(holder, factor)
            if value.numel() and value.shape[1 + apart :].numel() > 1:
                setattr(holder, factor, nn.Parameter(quantised(value, mode, 1 + apart), requires_grad=False))


def set_mode_(model: nn.Module, mode: Int8Mode | None) -> None:
    """Tell all converted layers inside of a model how it is quantised; None for floating point."""
    for module in model.modules():
        layer = module.template if isinstance(module, StackedLayer) else module
        if isinstance(layer, SPMLinear):
            layer.multiplies_int8 = mode == "int8-dynamic"


def quantize_linears_(model: Any, mode: Int8Mode) -> None:
    """Quantise the linear layers of any transformers model, its heads left out, in place, by torchao."""
    from torchao.quantization import quantize_ as torchao_quantize_

    names = set(int8_linears_(model))
    device = next(model.parameters()).device
    torchao_quantize_(model, config_of(mode, device), filter_fn=lambda _, name: name in names)


def saved_bytes(model: nn.Module) -> int:
    """Bytes that int8 parameters take less in a file than they would in floating point."""
    quantised: list[Any] = [parameter for parameter in model.parameters() if is_int8(parameter)]
    parts = [part for value in quantised for part in (value.qdata, value.scale, value.zero_point) if part is not None]
    before = sum(value.numel() * value.dtype.itemsize for value in quantised)
    return before - sum(part.numel() * part.itemsize for part in parts)


def int8_linears_(model: Any) -> list[str]:
    """Make the layers that int8 takes ``nn.Linear``, GPT-2's transposed ones too, in place; returns their names.

    A loaded model goes through it before its tensors are there. Heads and tied weights are none of them, as transformers
    has it, nor layers of one input, which torchao takes for something else.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    heads = HfQuantizer.get_modules_to_not_convert(model)
    names = []
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or not should_convert_module(f"{name}.weight", heads):
            continue
        if type(module) is nn.Linear and module.in_features == 1:
            continue
        names.append(name)
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
            linear.bias = module.bias
            replace_module(model, name, linear.train(module.training))
    return names


def _terms(layer: nn.Module) -> list[TermModule]:
    """The terms of a layer and the terms that they are made of."""
    return [module for module in layer.modules() if isinstance(module, TermModule)]


def _check_tensors(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_int8(parameter):
            raise OptionError(f"{name} is quantised already; load the model anew")
        if parameter.is_meta:
            raise OptionError(f"{name} is not in memory; load the model without a device_map that leaves parts on disk")


def _check_terms(name: str, layer: nn.Module, mode: Int8Mode) -> None:
    for term in _terms(layer):
        if term.int8_factors is None:
            raise UnsupportedLayerError(
                f"layer {name} has a {term.term.kind} term, which has no int8 form; convert without that kind"
            )
        if mode == "int8-dynamic" and not term.multiplies_int8:
            raise UnsupportedLayerError(
                f"layer {name} has {term.term.describe()}, whose products are too small for int8; take int8-weight-only, "
                "or convert without stages"
            )


def dequantize_(model: nn.Module) -> None:
    """Put floating point in the place of all int8 parameters, in place."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_int8(parameter):
                setattr(module, name, nn.Parameter(numbers(parameter)))
        if isinstance(module, Keeper):
            module.drop_cache_()
    set_mode_(model, None)
