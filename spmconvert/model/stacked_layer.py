"""The layers of all experts of one projection as one layer: of one design, with their parameters stacked.

A tensor of one expert's layer, such as ``lowrank.down.weight`` [rank, in_features], is [experts, rank, in_features] here,
under the same name; every kind of term stacks, and so does a dense layer. Low rank alone and dense layers are grouped
products of all experts (``grouped``), without a loop in Python. Other terms run expert by expert, in a layer that is lent
the slices of one expert after the other; where nothing is trained the slices stay in layers of their own, which keep what
they make of them.

What it gives up: the modules inside hold parameters and are never called, so hooks on them see nothing, and adapters that
are put there are refused.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spmconvert.errors import UnsupportedLayerError
from spmconvert.model.grouped import ends_of, grouped_product
from spmconvert.operator.int8 import is_int8
from spmconvert.operator.kept import Keeper, can_be_kept
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.offloaded import fetched, may_be_offloaded
from spmconvert.operator.reference import is_recorded

# weights and biases that are multiplied by one after the other, where a layer is nothing else
_DENSE_FACTORS = (("weight", "bias"),)
_LOW_RANK_FACTORS = (("lowrank.down.weight", ""), ("lowrank.up.weight", "lowrank.up.bias"))


class StackedLayer(Keeper):
    """One projection of all experts.

    Args:
        layers: of the experts in order, SPM layers or dense ones, all of one design.

    Attributes:
        template: one expert's layer, without memory.
        count: number of experts.

    Shape:
        rows [rows, in_features], experts [rows] -> [rows, out_features]
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(layers)
        # as a child it would be moved and saved
        self._template = (copy.deepcopy(layers[0]).to("meta"),)
        self._places: dict[str, tuple[list[str], str]] = {}
        states = [layer.state_dict(keep_vars=True) for layer in layers]
        for name, first in states[0].items():
            stacked = torch.stack([state[name].detach() for state in states])
            *way, last = name.split(".")
            self._places[name] = (way, last)
            _put(_holder(self, way), last, stacked, first.requires_grad if isinstance(first, nn.Parameter) else None)
        self._factors: tuple[tuple[str, str], ...] = ()
        if not isinstance(self.template, SPMLinear):
            self._factors = _DENSE_FACTORS
        elif self.template.design.only_low_rank:
            self._factors = _LOW_RANK_FACTORS
        self.train(layers[0].training)

    @property
    def template(self) -> nn.Module:
        """One expert's layer, on the meta device."""
        return self._template[0]

    @property
    def in_features(self) -> int:
        """Size of each input."""
        return int(self.template.in_features)  # type: ignore[arg-type]

    def forward(self, rows: Tensor, experts: Tensor, *, grouped: bool = True) -> Tensor:
        """Give every row to its expert.

        Args:
            rows: [rows, in_features], sorted by expert.
            experts: of each row, [rows], int64.
            grouped: make the products of all experts at once where the design allows it; otherwise one after the other.

        Returns:
            [rows, out_features], in the dtype of the rows or of autocast.

        Raises:
            UnsupportedLayerError: when something has replaced the modules inside.
        """
        if not may_be_offloaded(self):
            return self._run(rows, experts, grouped)
        with fetched(self):
            outputs = self._run(rows, experts, grouped)
        self.drop_cache_()
        return outputs

    def _run(self, rows: Tensor, experts: Tensor, grouped: bool) -> Tensor:
        tensors = self.tensors()
        if grouped and self._factors and not any(map(is_int8, tensors.values())):
            return self._at_once(tensors, rows, experts)
        return self._one_by_one(tensors, rows, experts)

    def tensors(self) -> dict[str, Tensor]:
        """All stacked tensors by their names in one expert's layer."""
        found = {}
        # at every call, so without the cost of walking through all modules
        for name, (way, last) in self._places.items():
            holder: Any = self
            for part in way:
                holder = holder._modules[part]
                if type(holder) is not nn.Module:
                    raise UnsupportedLayerError(
                        f"a {type(holder).__name__} is in the place of {name}, which holds parameters of experts and is "
                        "never called; leave experts out of adapters and the like"
                    )
            found[name] = holder._parameters[last] if last in holder._parameters else holder._buffers[last]
        return found

    def _at_once(self, tensors: Mapping[str, Tensor], rows: Tensor, experts: Tensor) -> Tensor:
        device, ends = rows.device.type, ends_of(experts, self.count)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
            rows = rows.to(torch.get_autocast_dtype(device))
        for weight, bias in self._factors:
            rows = grouped_product(rows, tensors[weight].to(rows.dtype), ends)
            if bias in tensors:
                rows = rows + tensors[bias].to(rows.dtype)[experts]
        return rows

    def _one_by_one(self, tensors: Mapping[str, Tensor], rows: Tensor, experts: Tensor) -> Tensor:
        if is_recorded():
            # what is written down must not depend on values: every row through every expert
            call = self._lending(tensors)
            outputs = [torch.where((experts == index)[:, None], call(index, rows), 0) for index in range(self.count)]
            return torch.stack(outputs).sum(0)
        kept = self._kept_layers(tensors)
        call = self._lending(tensors) if kept is None else lambda index, own: kept[index](own)
        ends = ends_of(experts, self.count)
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        # without rows the first expert says what the outputs are like
        given = [(index, own) for index, own in enumerate(rows.split(counts)) if len(own)] or [(0, rows)]
        return torch.cat([call(index, own) for index, own in given])

    def _lending(self, tensors: Mapping[str, Tensor]) -> Callable[[int, Tensor], Tensor]:
        """Calls the template with the slices of an expert."""
        # each slice by itself would cost a gradient of the whole stack; int8, which is not trained, has no other way
        slices = {name: tensor if is_int8(tensor) else tensor.unbind() for name, tensor in tensors.items()}

        def call(index: int, rows: Tensor) -> Tensor:
            lent = {name: stacked[index] for name, stacked in slices.items()}
            outputs: Tensor = functional_call(self.template, lent, (rows,))
            return outputs

        return call

    def _kept_layers(self, tensors: Mapping[str, Tensor]) -> list[nn.Module] | None:
        """A layer an expert where nothing is trained and a change of the stacks would be seen; None elsewhere."""
        parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
        buffers = [tensor for tensor in tensors.values() if not isinstance(tensor, nn.Parameter)]
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if trains or not can_be_kept(self, parameters, buffers):
            return None
        dtype, sources = parameters[0].dtype, [*parameters, *buffers]
        return self.keep(dtype, StackedLayer.layer, sources, lambda: [self.layer(index) for index in range(self.count)])

    def extra_repr(self) -> str:
        """Experts, and what each has."""
        return f"experts={self.count}, {self.template.extra_repr()}"

    def layer(self, index: int) -> nn.Module:
        """The layer of one expert, which shares the memory of this one."""
        layer = copy.deepcopy(self.template)
        for name, tensor in self.tensors().items():
            owner, _, last = name.rpartition(".")
            is_parameter = isinstance(tensor, nn.Parameter)
            _put(layer.get_submodule(owner), last, tensor[index].detach(), tensor.requires_grad if is_parameter else None)
        return layer.train(self.training)


def _holder(module: nn.Module, way: Sequence[str]) -> nn.Module:
    """The module at the end of a way of names, made of plain modules where it is not there."""
    for part in way:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _put(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool | None) -> None:
    """Give a module a parameter, or a buffer where ``requires_grad`` is None."""
    if requires_grad is None:
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=requires_grad))
