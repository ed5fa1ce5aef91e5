"""How the tensors of SPM layers come into a layer of vLLM: places that wait for them, and what the layer then computes.

vLLM's loaders look a tensor up by its name among the parameters of the model and call that parameter's
``weight_loader``, in a fused layer with the partition it belongs to. Partitions of several designs have tensors of
several shapes under one name, so the parameters that stand in the layer while it is loaded are empty: they have the
names, and hand what comes on to the module of its partition. When all has come these are frozen (``operator/frozen``) and
the places go.

vLLM keeps a layer's bias by itself where its model has one; then the bias of an SPM partition goes there, wherever the
file has it, and the layer adds it in one piece.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.errors import CorruptCheckpointError, UnsupportedLayerError
from spmconvert.operator.frozen import FrozenLinear
from spmconvert.operator.linear import MARK_SHAPE, SPMLinear
from spmconvert.operator.product import DenseProduct
from spmconvert.serving.partitions import Partition, check_sizes, position_of

BIAS = "bias"
AGAIN = "download or convert again"


class Incoming:
    """Layers of a checkpoint, while their tensors arrive. No module: what is loaded is not yet what the model runs.

    Args:
        partitions: what a layer of vLLM stands for.
        in_features: number of its inputs.
        dtype: of its inputs.

    Raises:
        CheckpointError: when a layer of the map does not fit into its place.
    """

    def __init__(self, partitions: Sequence[Partition], in_features: int, dtype: torch.dtype) -> None:
        self.partitions, self.dtype = list(partitions), dtype
        for partition in self.partitions:
            check_sizes(partition, in_features)
        self.modules = [_waiting_module(partition, in_features, dtype) for partition in self.partitions]
        self.tensors: dict[str, dict[int, Tensor]] = {}
        for position, module in enumerate(self.modules):
            for name, tensor in module.state_dict(keep_vars=True).items():
                # vLLM's layer has it
                if name != BIAS:
                    self.tensors.setdefault(name, {})[position] = tensor
        self.missing = {(position, name) for name, found in self.tensors.items() for position in found}

    def add_places_(self, layer: nn.Module) -> None:
        """Give a layer an empty parameter for every name that the checkpoint has for it."""
        for name, targets in self.tensors.items():
            *way, last = name.split(".")
            parent = layer
            for child in way:
                if child not in parent._modules:
                    parent.add_module(child, nn.Module())
                parent = parent.get_submodule(child)
            place = nn.Parameter(next(iter(targets.values())).new_empty(0), requires_grad=False)
            place.weight_loader = partial(self.receive, name)  # type: ignore[attr-defined]
            parent.register_parameter(last, place)

    def remove_places_(self, layer: nn.Module) -> None:
        """Take them away, but for a mark of a dense weight's name that nothing can take for one."""
        for name in self.tensors:
            first = name.partition(".")[0]
            if first in layer._modules or first in layer._parameters:
                delattr(layer, first)
        mark = next(iter(self.tensors["weight"].values()))
        layer.register_parameter("weight", nn.Parameter(mark.new_zeros(MARK_SHAPE), requires_grad=False))

    @torch.no_grad()
    def receive(self, name: str, place: nn.Parameter, loaded: Tensor, shard: object = None) -> None:
        """A ``weight_loader``: take a tensor of the checkpoint.

        Args:
            name: of the tensor inside of its layer.
            place: the empty parameter.
            loaded: the tensor.
            shard: partition that it belongs to, as vLLM calls it.

        Raises:
            CorruptCheckpointError: when the partition has no such tensor, or one of another shape or kind.
        """
        position = position_of(shard, self.partitions)
        partition, target = self.partitions[position], self.tensors[name].get(position)
        if target is None:
            raise CorruptCheckpointError(
                f"the checkpoint has {partition.name}.{name}, and the layer is {partition.design}; {AGAIN}"
            )
        if loaded.shape != target.shape or loaded.is_floating_point() != target.is_floating_point():
            raise CorruptCheckpointError(
                f"{partition.name}.{name} is {_kind(loaded)} in the checkpoint, and a layer that is {partition.design} "
                f"needs {_kind(target)}; {AGAIN}"
            )
        target.copy_(loaded)
        self.missing.discard((position, name))

    def check_complete(self) -> None:
        """Refuse a layer of which something did not come.

        Raises:
            CorruptCheckpointError: when a tensor is missing.
        """
        if self.missing:
            position, name = min(self.missing)
            raise CorruptCheckpointError(f"the checkpoint has no {self.partitions[position].name}.{name}; {AGAIN}")

    @torch.no_grad()
    def finish(self, bias: Tensor | None) -> "ServedLinear":
        """What the layer computes; its parameters stay with it, these modules are used up.

        Args:
            bias: vLLM's own for all partitions [out_features], to which those of SPM layers are written; None where its
                model has none.

        Raises:
            CorruptCheckpointError: when a tensor is missing.
        """
        self.check_complete()
        sizes = [partition.out_features for partition in self.partitions]
        own = None
        if bias is None and any(_held_bias(module) is not None for module in self.modules):
            mark = next(iter(self.tensors["weight"].values()))
            own = nn.Parameter(mark.new_zeros(sum(sizes), dtype=self.dtype), requires_grad=False)
        total = own if bias is None else bias
        if total is not None:
            for partition, module, part in zip(self.partitions, self.modules, total.split(sizes), strict=True):
                _write_bias_(partition.spec, _held_bias(module), part)
        frozen = [FrozenLinear(m, self.dtype) if isinstance(m, SPMLinear) else m for m in self.modules]
        return ServedLinear(frozen, sizes, own)


class ServedLinear(nn.Module):
    """All partitions of a layer of vLLM.

    Args:
        partitions: called with inputs [tokens, in_features] and a bias.
        sizes: outputs of each.
        bias: [out_features], which nobody else adds; or None.

    Shape:
        input [..., in_features] -> output [..., out_features]
    """

    def __init__(self, partitions: Sequence[nn.Module], sizes: Sequence[int], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.partitions = nn.ModuleList(partitions)
        self.sizes = list(sizes)
        self.bias = bias

    def products(self) -> list[DenseProduct]:
        """All that is multiplied by one matrix."""
        return [module for module in self.modules() if isinstance(module, DenseProduct)]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The outputs of all partitions side by side, plus a bias [out_features] in the place of the own one."""
        bias = self.bias if bias is None else bias
        tokens = x.reshape(-1, x.shape[-1])
        biases: Sequence[Tensor | None] = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        parts = [part(tokens, added) for part, added in zip(self.partitions, biases, strict=True)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y.view(*x.shape[:-1], y.shape[-1])


def check_bias(partition: Partition, *, has_bias: bool) -> None:
    """Refuse a bias that vLLM has no place for.

    Args:
        partition: of a layer of vLLM.
        has_bias: whether that has one.

    Raises:
        UnsupportedLayerError: when the checkpoint's cannot be loaded.
    """
    spec = partition.spec
    if spec is not None and spec.bias and spec.design.bias_name == BIAS and not has_bias:
        raise UnsupportedLayerError(
            f"layer {partition.name} has a bias where vLLM's model has none, and vLLM would leave it out; convert without "
            "--new-bias"
        )


def _waiting_module(partition: Partition, in_features: int, dtype: torch.dtype) -> nn.Module:
    """The module that a partition's tensors go to, on the default device."""
    spec = partition.spec
    if spec is None:
        return DenseProduct(torch.empty(partition.out_features, in_features, dtype=dtype))
    own = dtype if spec.dtype is None else getattr(torch, spec.dtype)
    design = spec.design
    inside = spec.bias and design.bias_name != BIAS
    return SPMLinear(in_features, partition.out_features, inside, terms=design.terms, dtype=own).requires_grad_(False)


def _held_bias(module: nn.Module) -> Tensor | None:
    return module.held_bias if isinstance(module, SPMLinear) else None


def _write_bias_(spec: LayerSpec | None, held: Tensor | None, part: Tensor) -> None:
    """Put an SPM layer's bias into its part of the whole one; those of dense layers came there by themselves."""
    if held is not None:
        part.copy_(held)
    elif spec is not None and not spec.bias:
        part.zero_()


def _kind(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "a number"
    return f"{shape} ({str(tensor.dtype).removeprefix('torch.')})"
