"""Experts of a mixture with one stacked layer a projection: what a converted model runs.

Conversion fits one layer an expert, in opened experts (``experts``); these are stacked at its end, when the checkpoint is
written and in a model that is loaded. The call is that of transformers' experts. The rows of all tokens are sorted by
expert once, and a projection is given all of them; how it multiplies is its own affair (``stacked_layer``). Where the
model's ``experts_implementation`` is ``eager``, experts run one after the other, as those of transformers do.

A projection that was left dense beside a replaced one is stacked as well, so that a module has one form in files and in
memory.
"""

import torch
from torch import Tensor, nn

from spmconvert.model.experts import ExpertsCall, OpenedExperts, added_up
from spmconvert.model.stacked_layer import StackedLayer
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.reference import is_recorded


class StackedExperts(ExpertsCall):
    """All experts of a block.

    Args:
        opened: whose layers are stacked, those of a projection all of one design. It loses them, and is kept for what else
            it has.
    """

    def __init__(self, opened: OpenedExperts) -> None:
        super().__init__()
        self.names, self.count, self.batched = opened.names, opened.count, opened.batched
        self.register_buffer(opened.mark, getattr(opened, opened.mark))
        experts = opened.experts
        for name in self.names:
            self.add_module(name, StackedLayer([expert.get_submodule(name) for expert in experts]))
        for index in range(self.count):
            delattr(opened, str(index))
        # a norm behind each expert, and what nothing multiplies by
        for name, beside in opened.named_children():
            self.add_module(name, beside)
        # as a child it would be moved and saved
        self._opened = (opened,)
        self.train(opened.training)

    def _chosen(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        experts, order = index.reshape(-1).sort(stable=True)
        rows = hidden_states[order // index.shape[1]]
        if self._opened[0].zeros:
            # what is handed on as it is goes through the last expert for nothing: the host waits for no count
            outputs = self._run(rows, experts.clamp(max=self.count - 1))
            outputs = torch.where((experts < self.count)[:, None], outputs, rows)
        else:
            outputs = self._run(rows, experts)
        return added_up(outputs, order, weights)

    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        experts = torch.arange(self.count, device=hidden_states.device)
        experts = experts.repeat_interleave(len(hidden_states) // self.count)
        if is_recorded():
            return self._run(hidden_states, experts)
        routed = hidden_states.any(1).nonzero()[:, 0]
        found = self._run(hidden_states[routed], experts[routed])
        return found.new_zeros(len(hidden_states), found.shape[1]).index_copy(0, routed, found)

    def _run(self, rows: Tensor, experts: Tensor) -> Tensor:
        """What experts make of rows that are sorted by them."""
        (opened,) = self._opened
        first, down = (self.get_submodule(name) for name in self.names)
        grouped = opened.implementation != "eager"
        outputs: Tensor = down(opened.gated(first(rows, experts, grouped=grouped)), experts, grouped=grouped)
        return outputs if opened.norm is None else self.get_submodule(opened.norm)(outputs)

    def opened(self) -> OpenedExperts:
        """Opened experts with a layer an expert again, which share the memory of the stacked ones."""
        (opened,) = self._opened
        beside = dict(opened.named_children())
        for name in beside:
            delattr(opened, name)
        for index in range(self.count):
            expert = nn.Module()
            for name in self.names:
                stacked = self.get_submodule(name)
                assert isinstance(stacked, StackedLayer)
                expert.add_module(name, stacked.layer(index))
            opened.add_module(str(index), expert)
        # behind the experts, as they were
        for name in beside:
            opened.add_module(name, self.get_submodule(name))
        opened.register_buffer(opened.mark, getattr(self, opened.mark))
        return opened.train(self.training)


def is_converted(module: nn.Module) -> bool:
    """Whether a module is a converted layer: one by itself, or those of all experts of a projection."""
    return isinstance(module, SPMLinear) or (isinstance(module, StackedLayer) and isinstance(module.template, SPMLinear))
