"""Calibration rows on their way through the dense model and the converted one, a block of a chain at a time.

Whatever is fitted to what the converted model feeds it (``sequential``), or trained to make up for it (``refine``), needs
the rows as they reach a block in both models. There is one model; the block at work is copied, its layers are replaced in
the copy, and the copy is what the converted model runs. Only the hidden states between two blocks are kept, and what the
layers of the block at work put out.

What it gives up: targets outside of one chain of blocks; and experts see other tokens in each of the two models, so theirs
are never paired.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.statistics import attended
from spmconvert.errors import CalibrationError, OptionError
from spmconvert.model.chain import Chain, Walk, common_list
from spmconvert.model.recording import recorded
from spmconvert.model.states import States
from spmconvert.model.swap import replace_module


def layer_blocks(model: Any, names: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The module list that holds all layers, and the block of every layer.

    Raises:
        OptionError: when they are not all inside of one list of blocks.
    """
    found = common_list(model, names)
    if found is None:
        raise OptionError(
            f"fits in sequence and refinement need all layers in one list of blocks, {names[0]} and {names[-1]} have none "
            "in common; choose targets of one stack, or --independent and --refine 0"
        )
    return found


def on_one_path(model: Any, names: Sequence[str]) -> bool:
    """Whether all layers are in one list of blocks."""
    return common_list(model, names) is not None


def no_chain(container: str) -> OptionError:
    """What to say of blocks that are no chain."""
    return OptionError(
        f"the blocks of {container} do not each take what the one before them puts out, so their layers cannot be "
        "fitted one after the other, nor refined; choose --independent and --refine 0"
    )


class Streams:
    """Calibration rows in front of one block, in the dense and in the converted model.

    Every block runs once in the dense model, for the outputs of all of its layers, and in the converted model once for each
    input that layers have and once to move on.

    Args:
        chain: the dense model, which stays as it is.
        batches: keyword arguments of the model.
        names: all layers that are converted.
        paired: those for which ``pairs`` will be asked, whose outputs are kept for it; None for all.

    Attributes:
        masks: which tokens are no padding, by batch; None for all.
    """

    def __init__(
        self,
        chain: Chain,
        batches: Sequence[dict[str, Any]],
        names: Sequence[str],
        *,
        paired: Collection[str] | None = None,
    ) -> None:
        self._chain, self._batches, self._names = chain, batches, names
        self._paired = names if paired is None else paired
        self._walk = Walk(chain, batches)
        self.masks = self._walk.masks
        # the same as in the dense model until a block is converted
        self._converted: States | None = None
        self._forget()

    def _forget(self) -> None:
        self._block: nn.Module | None = None
        self._waiting: set[str] = set()
        self._order: list[str] = []
        self._dense_outputs: dict[str, States] = {}
        self._dense_after: States | None = None
        self._inputs: dict[str, list[Tensor]] = {}

    @property
    def index(self) -> int:
        """Position of the block at work."""
        return self._walk.index

    @property
    def block(self) -> nn.Module:
        """The block at work of the converted model, a copy with its tensors in memory, float32."""
        if self._block is None:
            self._block = self._chain.block(self.index)
            self._waiting = set(self._here(self._paired))
        return self._block

    @property
    def dense(self) -> States:
        """What goes into the block at work of the dense model, by batch."""
        return self._walk.states

    @property
    def converted(self) -> States:
        """The same of the converted model."""
        return self._walk.states if self._converted is None else self._converted

    def _here(self, names: Collection[str]) -> list[str]:
        """Those of some layers that are in the block at work, by their names inside of it."""
        return [self.inner_name(name) for name in names if name.startswith(self.full_name(""))]

    def full_name(self, name: str) -> str:
        """The model's name for something inside of the block at work."""
        return f"{self._chain.name(self.index)}.{name}"

    def inner_name(self, name: str) -> str:
        """The block's own name for something that the model calls ``name``."""
        return name.removeprefix(self.full_name(""))

    def calling_order(self) -> list[str]:
        """Layers of the block at work in the order in which it calls them; it may register them in another one."""
        self.dense_after()
        return [self.full_name(name) for name in self._order]

    def convert(self, name: str, layer: nn.Module) -> None:
        """Put a layer in the place of the dense one of that name, which is the model's."""
        inside = self.inner_name(name)
        replace_module(self.block, inside, layer)
        self._waiting.discard(inside)

    @torch.no_grad()
    def pairs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of a layer of the block when converted, its dense outputs, by batch: [rows, features] each."""
        self.dense_after()
        inside = self.inner_name(name)
        if inside not in self._inputs:
            self._run_converted(inside)
        for inputs, outputs in zip(self._inputs.pop(inside), self._dense_outputs.pop(inside), strict=True):
            if len(inputs) != len(outputs):
                raise CalibrationError(
                    f"{name} sees {len(inputs)} tokens in the converted model and {len(outputs)} in the dense one, as an "
                    "expert does; choose --independent"
                )
            yield inputs, outputs

    def run(self, batch: int) -> Tensor:
        """What the converted model's block makes of a batch, float32; differentiable in the block's parameters."""
        return self._walk.run(self.block, batch, self.converted[batch])

    def reading_norm(self) -> nn.Module | None:
        """The norm through which everything behind the block reads what it puts out, float32; None where there is none."""
        return self._chain.reader(self.index, self.dense_after()[0], self._batches[0], self._walk.calls(0))

    @torch.no_grad()
    def dense_after(self) -> States:
        """What the dense model's block puts out, by batch; its layers' outputs are kept until the next one."""
        if self._dense_after is None:
            here, names = self._here(self._names), self._here(self._paired)
            block = self._chain.block(self.index)
            outputs: dict[str, list[Tensor]] = {name: [] for name in names}
            after = States(list(self._walk.states), self._chain.folder)
            for batch, mask in enumerate(self.masks):
                with recorded(block, here, "outputs") as caught:
                    after[batch] = self._walk.run(block, batch)
                for name in names:
                    outputs[name].append(attended(caught[name], mask))
                self._order = self._order or [*caught, *(name for name in here if name not in caught)]
            self._dense_outputs = {name: States(found, self._chain.folder) for name, found in outputs.items()}
            self._dense_after = after
        return self._dense_after

    @torch.no_grad()
    def advance(self) -> None:
        """Move all rows through the block at work of both models."""
        after = self.dense_after()
        if self._block is not None or self._converted is not None:
            block = self.block
            if self._converted is None:
                self._converted = States(list(self._walk.states), self._chain.folder)
            for batch in range(len(self.masks)):
                self._converted[batch] = self._walk.run(block, batch, self._converted[batch])
        self._walk.states = after
        self._walk.index += 1
        self._forget()

    def _run_converted(self, name: str) -> None:
        """Inputs of a layer in the converted model, and of every other one that has the very same input."""
        block = self.block
        names = sorted(self._waiting)
        for batch, mask in enumerate(self.masks):
            with recorded(block, names, "inputs") as caught:
                self.run(batch)
            inputs = attended(caught[name], mask)
            for other in names:
                if caught[other] is caught[name]:
                    self._inputs.setdefault(other, []).append(inputs)
