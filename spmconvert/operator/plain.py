"""Layers and terms as plain modules: their tensors under the names of a checkpoint, and what they compute.

Nothing about how they are fitted, chunked or launched, and no import but torch and the arithmetic itself, so that a
portable checkpoint can carry exactly this source (``exporting/source``). They are tested against the operator, by kind.

What it gives up is speed where the operator has better than a plain form. Low rank and block-diagonal factors are the
products that they are; stages and 2:4 are multiplied out into one dense matrix, which is kept between calls that record no
gradient: as fast as the dense layer, and as large in memory.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spmconvert.operator.geometry import Geometry
from spmconvert.operator.reference import is_recorded, is_transformed, plain_forward
from spmconvert.operator.terms.monarch import both_products
from spmconvert.operator.terms.sparse24 import placed


class PlainLayer(nn.Module):
    """A bias and a sum of terms, computed in the dtype of its tensors.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is one; it belongs to low rank where that is among the terms.
        terms: modules by their names.
        dtype: of the bias and the mark ``weight``, which holds nothing.
    """

    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, terms: dict[str, nn.Module], dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(1, 1, 1, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias and "lowrank" not in terms else None
        for name, term in terms.items():
            self.add_module(name, term)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features], in the dtype of x or of autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tokens = x.reshape(-1, self.in_features).to(self.weight.dtype)
        first, *others = self.children()
        y = first(tokens)
        for term in others:
            y = y + term(tokens)
        y = y if self.bias is None else y + self.bias
        return y.to(dtype).view(*x.shape[:-1], self.out_features)


def plain_lowrank(
    in_features: int, out_features: int, *, rank: int, bias: bool, dtype: torch.dtype | None
) -> nn.Sequential:
    """Two linear layers, ``down`` and ``up``, the second with the layer's bias."""
    down = nn.Linear(in_features, rank, bias=False, dtype=dtype)
    return nn.Sequential(OrderedDict(down=down, up=nn.Linear(rank, out_features, bias, dtype=dtype)))


def _fresh(shape: tuple[int, ...], dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype) * 0.02)


class PlainMonarch(nn.Module):
    """A grid of blocks of one rank, or with one block of inputs a block-dense product."""

    def __init__(
        self, inputs: int, outputs: int, *, blocks_out: int, rank: int, blocks_in: int = 1, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        first = (blocks_in, rank * blocks_out, inputs // blocks_in)
        second = (blocks_out, outputs // blocks_out, blocks_in * rank)
        self.first = _fresh(first, dtype)
        self.second = _fresh(second, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X [tokens, in_features] -> [tokens, out_features]."""
        return both_products(x, self.first, self.second)


class MultipliedOut(nn.Module):
    """A term whose matrix is kept between calls that record no gradient, until one of its tensors changes.

    A write through ``parameter.data`` is not seen; call ``train()`` or ``eval()`` after one.
    """

    _kept: tuple[Any, Tensor] | None = None

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features

    def product(self, x: Tensor) -> Tensor:
        """X [tokens, in_features] -> [tokens, out_features], differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The product, by the kept matrix where nothing is recorded."""
        if torch.is_grad_enabled() or is_recorded() or is_transformed():
            return self.product(x)
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return self.product(x)
        state = (x.dtype, [(tensor.data_ptr(), tensor._version) for tensor in tensors])
        if self._kept is None or self._kept[0] != state:
            identity = torch.eye(self.in_features, device=x.device)
            matrix = self.product(identity).t().to(x.dtype).contiguous()
            self._forget()
            self._kept = (state, matrix)
        return linear(x, self._kept[1])

    def train(self, mode: bool = True) -> "MultipliedOut":
        """Set the mode and forget the matrix."""
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        for module in self.modules():
            if isinstance(module, MultipliedOut):
                module._kept = None

    def _apply(self, *arguments: Any, **options: Any) -> "MultipliedOut":
        self._forget()
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class PlainStages(MultipliedOut):
    """SPM stages between two diagonals."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None, **numbers: Any) -> None:
        super().__init__(in_features)
        self.geometry = Geometry(in_features, out_features, **numbers)
        self.weight = _fresh(self.geometry.weight_shape(), dtype)
        self.scale_in = _fresh((self.geometry.width,), dtype)
        self.scale_out = _fresh((self.geometry.width,), dtype)

    def product(self, x: Tensor) -> Tensor:
        """Stage by stage."""
        return plain_forward(x, self.weight, self.scale_in, self.scale_out, self.geometry)


class PlainSparse24(MultipliedOut):
    """Two of every four weights, and where they stand."""

    positions: Tensor

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None) -> None:
        super().__init__(in_features)
        groups = -(-in_features // 4)
        self.values = _fresh((out_features, 2 * groups), dtype)
        self.register_buffer("positions", torch.zeros(out_features, -(-groups // 2), dtype=torch.uint8))

    def product(self, x: Tensor) -> Tensor:
        """By the weights at their places."""
        return linear(x, placed(self.values, self.positions, self.in_features).to(x.dtype))


class PlainWrapped24(PlainSparse24):
    """The same between stages on both sides."""

    def __init__(self, in_features: int, out_features: int, *, block: int, stages: int, dtype: torch.dtype | None) -> None:
        super().__init__(in_features, out_features, dtype=dtype)
        numbers = {"stages": stages, "variant": "general", "block": block}
        before, behind = (-(-size // block) * block for size in (in_features, out_features))
        self.before = PlainStages(in_features, in_features, width=before, **numbers, dtype=dtype)
        self.behind = PlainStages(out_features, out_features, width=behind, **numbers, dtype=dtype)

    def product(self, x: Tensor) -> Tensor:
        """Stages, weights, stages."""
        y: Tensor = self.behind(super().product(self.before(x)))
        return y
