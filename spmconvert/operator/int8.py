"""Factors in int8: torchao's ``Int8Tensor`` in the place of a parameter, and what terms do with it.

A factor is int8 numbers with one float32 scale a slice, symmetric. Weight-only factors are multiplied out where they are
used; merged blocks and matrices that a layer keeps between calls stay in floating point, so there int8 saves bytes in files
and in what is kept, not time. Dynamic ones multiply activations that are rounded to int8 for every token, in int32.

torchao is optional, and imported when something is quantised or loaded. Two-dimensional factors are multiplied by its own
``linear``; it has no batched product, so a batch is one product after the other.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from spmconvert.errors import OptionError

Int8Mode = Literal["int8-weight-only", "int8-dynamic"]
INT8_MODES: tuple[Int8Mode, ...] = get_args(Int8Mode)
INSTALL = "pip install 'spmconvert[quant]'"


def check_torchao() -> None:
    """Say what to install where torchao is missing.

    Raises:
        OptionError: when it is.
    """
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise OptionError(f"int8 needs torchao, which is not installed; {INSTALL}") from None


def is_int8(factor: Tensor) -> bool:
    """Whether a tensor is quantised by torchao."""
    return hasattr(type(factor), "tensor_data_names")


def is_dynamic(factor: Any) -> bool:
    """Whether activations are rounded to int8 as well where a factor is multiplied by."""
    return is_int8(factor) and factor.act_quant_kwargs is not None


def numbers(factor: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A factor in floating point, in a dtype or in its own."""
    found: Tensor = factor.dequantize(dtype or factor.dtype) if is_int8(factor) else factor.to(dtype or factor.dtype)
    return found


def config_of(mode: Int8Mode, device: torch.device) -> Any:
    """Torchao's configuration of a mode, which leaves torch.compile's settings alone."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.utils import should_reduce_range

    if mode == "int8-weight-only":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    # sums of products of eight bits overflow in processors without instructions for them
    return Int8DynamicActivationInt8WeightConfig(reduce_range=should_reduce_range(device), set_inductor_config=False)


def quantised(factor: Tensor, mode: Int8Mode, apart: int) -> Tensor:
    """A factor in int8.

    Args:
        factor: on any device, not quantised.
        mode: one of ``INT8_MODES``.
        apart: leading axes whose slices have a scale each.
    """
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    reduced = getattr(config_of(mode, factor.device), "reduce_range", False)
    inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow(), reduce_range=reduced) if mode == "int8-dynamic" else None
    slices = factor.detach().reshape(math.prod(factor.shape[:apart]), -1)
    rows = Int8Tensor.from_hp(slices, PerRow(), act_quant_kwargs=inputs, reduce_range=reduced)
    scale = rows.scale.view(*factor.shape[:apart], *(1,) * (factor.dim() - apart))
    found: Tensor = Int8Tensor(
        rows.qdata.view(factor.shape),
        scale,
        [1] * apart + list(factor.shape[apart:]),
        factor.dtype,
        act_quant_kwargs=inputs,
        reduce_range=reduced,
    )
    return found


def with_numbers(factor: Any, qdata: Tensor) -> Tensor:
    """The factor [rows, columns] with its numbers at other places of each row, qdata int8 [rows, any]."""
    found: Tensor = type(factor)(
        qdata,
        factor.scale,
        [1, qdata.shape[1]],
        factor.dtype,
        act_quant_kwargs=factor.act_quant_kwargs,
        reduce_range=factor.reduce_range,
    )
    return found


def batched_product(x: Tensor, factor: Tensor) -> Tensor:
    """X [batches, tokens, columns] times a dynamic factor [batches, rows, columns] -> [batches, tokens, rows]."""
    return torch.stack([linear(rows, factor[index]) for index, rows in enumerate(x)])
