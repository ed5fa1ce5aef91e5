"""What a module of fused parameters is opened into: a module with the same call whose matrices are linear layers.

Tools that know layers (hooks, names, shapes) do not reach into parameters that a module multiplies by itself, such as the
experts of a mixture or the gates of a recurrence. Opened, each matrix is an ``nn.Linear``, a view of the parameter until it
is replaced. Which part of which parameter a layer is made of is said once, here, for checkpoints to be read and written by.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# no parameter: a program that does not know opened modules fails on its shape instead of drawing something at random
MARK_SHAPE = (1, 1, 1)


@dataclass(frozen=True)
class Part:
    """A tensor of an opened module, and where it lies in the fused one.

    Attributes:
        name: of the tensor in the opened module, such as ``3.down.weight``.
        parameter: of the fused module.
        index: on the first axis of the parameter; None for all of it.
        transposed: whether the matrix lies the other way round in it.
        idle: whether nothing multiplies by it: it is kept, and is no layer.
    """

    name: str
    parameter: str
    index: int | None = None
    transposed: bool = False
    idle: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor, as a view of the parameter."""
        own = parameter if self.index is None else parameter[self.index]
        return own.t() if self.transposed else own

    def fused(self, tensor: Tensor) -> Tensor:
        """The tensor as it lies in the parameter, without its index."""
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class Routed:
    """Which tokens the rows of a layer are.

    Attributes:
        positions: of each row among the tokens, [rows].
        tokens: how many there are.
    """

    positions: Tensor
    tokens: int


class Uncalled(nn.Module):
    """The parameters of a layer that is never called."""


class OpenedModule(nn.Module):
    """A module whose parameters are linear layers.

    Args:
        fused: whose parameters the layers are views of. It loses them, and is kept for what else it has.
        parts: every tensor of the layers.

    Attributes:
        parts: the same.
        mark: name of a buffer that is no parameter, one that the fused module would look for in a checkpoint.
        share: of the tokens, that each layer sees.
        alike: whether the layers of one name, such as those of all experts, have one design.
        stacks: whether those are stacked in a converted model and its checkpoint.
        routed: which tokens the layer that is being called is given; None for all of them, or where that is not known.
    """

    alike = False
    stacks = False

    def __init__(self, fused: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.parts, self.mark, self.share = parts, parts[-1].parameter, 1.0
        self.routed: Routed | None = None
        for part in parts:
            if part.name.endswith(".weight"):
                self._add(fused, part)
        last = getattr(fused, self.mark)
        self.register_buffer(self.mark, torch.zeros(MARK_SHAPE, dtype=last.dtype, device=last.device))
        for name in dict.fromkeys(part.parameter for part in parts):
            delattr(fused, name)
        # as a child it would be initialised, moved and saved
        self._fused: tuple[Any] = (fused,)
        self.train(fused.training)

    def _add(self, fused: nn.Module, part: Part) -> None:
        """Build the layer of a weight, with its bias."""
        name = part.name.removesuffix(".weight")
        bias = next((other for other in self.parts if other.name == f"{name}.bias"), None)
        parameter = getattr(fused, part.parameter)
        weight = part.of(parameter.data)
        layer: nn.Module = (
            Uncalled() if part.idle else nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
        )
        layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.of(getattr(fused, bias.parameter).data), requires_grad=parameter.requires_grad)
        around, _, child = name.rpartition(".")
        if around and around not in self._modules:
            self.add_module(around, nn.Module())
        self.get_submodule(around).add_module(child, layer)

    def is_stepwise(self, layer: str) -> bool:
        """Whether layers of a name are called for every token by itself."""
        return False

    def watch(self, around: nn.Module) -> list[RemovableHandle]:
        """Find out which tokens come to which layer while these hooks are there, where a call does not say so."""
        return []

    def by_parameter(self) -> Iterator[tuple[str, list[Part]]]:
        """Fused parameters, and their parts in order."""
        for name in dict.fromkeys(part.parameter for part in self.parts):
            yield name, [part for part in self.parts if part.parameter == name]

    def closed(self) -> nn.Module:
        """The fused module again, with parameters of its own; all layers have to be dense."""
        (fused,) = self._fused
        for name, parts in self.by_parameter():
            own = [part.fused(self.get_parameter(part.name)).detach() for part in parts]
            setattr(fused, name, nn.Parameter(own[0].clone() if parts[0].index is None else torch.stack(own)))
        module: nn.Module = fused.train(self.training)
        return module
