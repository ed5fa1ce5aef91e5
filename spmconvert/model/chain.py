"""A model as a chain of blocks, of which one is in memory at a time.

Calibration, curvature, measured responses, fits in sequence and refinement all walk a model's list of blocks: every batch
of rows is taken through one block before the next is loaded. So a model takes as much memory as what is beside its blocks,
two blocks, and the hidden states between them, which ``states`` keeps. Blocks are computed with in float32, whatever the
checkpoint has.

What a block is given beside the hidden state comes from the model itself: it runs with blocks that hand on what they get.
What is behind the blocks, the last norm and the head, runs in the same way, with a last block that gives the state that is
wanted. Neither needs to know an architecture; whether it is right for one is checked on a row (``chain_through``).

What it gives up: models whose blocks do not each take what the one before puts out, or are called more than once, or hand
on more than the first one found out. They have to be in memory as a whole.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.model.architecture import runs_on
from spmconvert.model.opening import open_
from spmconvert.model.states import States
from spmconvert.operator.offloaded import fetched

# what two ways of running a block may differ by, as a share of the norm
CHAIN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Call:
    """What a block is given beside the hidden state.

    Attributes:
        arguments: behind it, by position.
        keywords: by name.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, state: Tensor) -> Tensor:
        """What a block in float32 makes of a state."""
        return _state_of(block(state, *_widened(self.arguments), **_widened(self.keywords)))


class Chain:
    """A list of blocks and what is around it.

    Args:
        model: the whole; the weights of its blocks may be on disk. It is left as it is.
        container: name of its list of blocks.
        folder: where hidden states may be that are too many for memory; None keeps them there.

    Attributes:
        model: the whole.
        container: name of the list.
        folder: for hidden states.
    """

    def __init__(self, model: Any, container: str, folder: Path | None = None) -> None:
        self.model, self.container, self.folder = model, container, folder
        self._blocks = model.get_submodule(container)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        # logits of a large vocabulary would be the largest tensor, and nobody asks for them on the way to the blocks
        self._around = model.get_submodule(prefix[:-1]) if len(prefix) > 1 and container.startswith(prefix) else model
        # how many things a block gives beside the state; None where it gives the state alone
        self._others: int | None = None
        # of the state in front of the first block
        self._dtype = torch.float32

    def __len__(self) -> int:
        return len(self._blocks)

    def name(self, index: int) -> str:
        """Of a block in the model."""
        return f"{self.container}.{index}"

    def block(self, index: int) -> nn.Module:
        """A block with its tensors in memory, float32, and its experts opened."""
        copied = loaded_copy(self._blocks[index])
        open_(copied, config=self.model.config)
        return copied

    def starts(self, batches: Sequence[dict[str, Any]]) -> list[tuple[Tensor, list[Call]]]:
        """For keyword arguments of the model the state in front of the first block, and how every block is called."""
        first = None if self._others is None else self.block(0)
        with torch.no_grad():
            return [self._start(batch, first) for batch in batches]

    def _start(self, batch: dict[str, Any], first: nn.Module | None) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []
        given: list[Tensor] = []
        others: tuple[Any, ...] = ()

        def hand_on(_: int, state: Tensor, call: Call) -> Any:
            nonlocal others
            if first is not None and not calls:
                # what the first block finds out for all, such as relative positions
                others = first(state.float(), *_widened(call.arguments), **_widened(call.keywords))[1:]
            calls.append(call)
            given.append(state)
            return state if first is None else (state, *others)

        with self._called(hand_on):
            self._around(**self._without_cache(batch))
        self._dtype = given[0].dtype
        return given[0].float(), calls

    def _without_cache(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Keys and values of one run of a block are nothing to the next one."""
        takes = "use_cache" in inspect.signature(self._around.forward).parameters
        return {**batch, "use_cache": False} if takes else batch

    @contextmanager
    def ending_in(self, state: Tensor | None = None) -> Iterator[None]:
        """The model runs as if its last block had put out a state; without one, as if there were no blocks."""

        def hand_on(index: int, given: Tensor, _: Call) -> Any:
            after = given if state is None or index < len(self) - 1 else state.to(self._dtype)
            return after if self._others is None else (after, *(None,) * self._others)

        with self._called(hand_on):
            yield

    @contextmanager
    def _called(self, called: Callable[[int, Any, Call], Any]) -> Iterator[None]:
        """Have something else called in the place of blocks, with index, state and the rest of the call."""
        from transformers import Cache

        before = [block.__dict__.get("forward") for block in self._blocks]

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                state, *rest = arguments or (keywords.pop("hidden_states", None),)
                # keys and values of one run are nothing to the next one, also where the model takes no use_cache
                plain = {name: None if isinstance(value, Cache) else value for name, value in keywords.items()}
                return called(index, state, Call(tuple(rest), plain))

            return forward

        for index, block in enumerate(self._blocks):
            block.forward = forward_of(index)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                # a list may have a block twice
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward

    @torch.no_grad()
    def reader(self, index: int, state: Tensor, batch: dict[str, Any], calls: Sequence[Call]) -> nn.Module | None:
        """The first module that takes what a block puts out, float32, where that has vectors for parameters alone.

        Args:
            index: of the block.
            state: that it puts out.
            batch: for which.
            calls: of all blocks for that batch.
        """
        found: list[nn.Module] = []
        taken = state.to(self._dtype) if index == len(self) - 1 else state

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0] is taken:
                found.append(module)

        behind = self.model if index == len(self) - 1 else self.block(index + 1)
        handles = [module.register_forward_pre_hook(note) for module in behind.modules() if _has_vectors_alone(module)]
        try:
            if index == len(self) - 1:
                with self.ending_in(taken):
                    self._around(**batch)
            else:
                calls[index + 1].run(behind, taken)
        finally:
            for handle in handles:
                handle.remove()
        return loaded_copy(found[0]) if found else None

    @torch.no_grad()
    def is_sound(self, batch: dict[str, Any]) -> bool:
        """Whether blocks are called once each, in order, with what the one before puts out, by the first row of a batch.

        Each is run as the model calls it, and as this class does.
        """
        row = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
        order: list[int] = []
        states: list[Any] = []
        outputs: list[Any] = []

        def run(index: int, state: Any, call: Call) -> Any:
            block = self.block(index)
            output = block(state.float(), *_widened(call.arguments), **_widened(call.keywords))
            order.append(index)
            states.append(state)
            outputs.append(output)
            # whatever is around the blocks computes in its own dtype
            after = _state_of(output).to(state.dtype)
            return after if isinstance(output, Tensor) else (after, *output[1:])

        with self._called(run), runs_on(self.model, row):
            self._around(**self._without_cache(row))
        forms = {None if isinstance(output, Tensor) else len(output) - 1 for output in outputs}
        if order != list(range(len(self))) or len(forms) != 1:
            return False
        (self._others,) = forms
        after = list(map(_state_of, outputs))
        if not all(map(_agree, states[1:], after)):
            return False
        ((_, calls),) = self.starts([row])
        # twice: a call that leaves something behind, as in a cache, is not the same again
        return all(
            _agree(calls[index].run(block, states[index]), after[index])
            for index in order
            for block in [self.block(index)] * 2
        )


class Walk:
    """Batches of rows in front of one block of a chain.

    Args:
        chain: that they are taken through.
        batches: keyword arguments of the model.

    Attributes:
        index: of the block.
        states: what goes into it, by batch.
        masks: which tokens are no padding, by batch; None for all.
    """

    def __init__(self, chain: Chain, batches: Sequence[dict[str, Any]]) -> None:
        starts = chain.starts(batches)
        self.index = 0
        self.states = States([state for state, _ in starts], chain.folder)
        self.masks: list[Tensor | None] = [batch.get("attention_mask") for batch in batches]
        self._calls = [calls for _, calls in starts]

    def __len__(self) -> int:
        return len(self.states)

    def run(self, block: nn.Module, batch: int, state: Tensor | None = None) -> Tensor:
        """What a block in the place of the one at work makes of a batch; differentiable in its parameters and a state."""
        return self._calls[batch][self.index].run(block, self.states[batch] if state is None else state)

    def calls(self, batch: int) -> list[Call]:
        """How the model calls all of its blocks for a batch."""
        return self._calls[batch]

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Take all batches through a block."""
        for batch in range(len(self)):
            self.states[batch] = self.run(block, batch)
        self.index += 1


def chain_through(model: Any, container: str, batch: dict[str, Any], folder: Path | None = None) -> Chain | None:
    """The chain of a list of blocks, or None where it is none for a batch of keyword arguments."""
    chain = Chain(model, container, folder)
    return chain if chain.is_sound(batch) else None


def common_list(model: Any, names: Sequence[str]) -> tuple[str, dict[str, int]] | None:
    """The module list that holds all layers, and the block of every layer; None where there is none."""
    containers = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for container in sorted(containers, key=len):
        if all(name.startswith(f"{container}.") for name in names):
            return container, {name: int(name.removeprefix(f"{container}.").split(".")[0]) for name in names}
    return None


def loaded_copy(module: nn.Module) -> nn.Module:
    """A copy of a module in float32 with its tensors in memory, wherever accelerate keeps them, that nobody watches."""
    with fetched(nn.ModuleList([module])):
        hooks = [inner.__dict__["_hf_hook"] for inner in module.modules() if "_hf_hook" in inner.__dict__]
        copied = copy.deepcopy(module, {id(hook): hook for hook in hooks})
    for inner in copied.modules():
        for name in ("_hf_hook", "_old_forward", "forward"):
            inner.__dict__.pop(name, None)
    return copied.requires_grad_(False).float()


def _has_vectors_alone(module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and all(parameter.dim() == 1 for parameter in own)


def _state_of(output: Any) -> Tensor:
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


def _agree(state: Tensor, wanted: Tensor) -> bool:
    return state.shape == wanted.shape and bool((state - wanted).norm() <= CHAIN_TOLERANCE * wanted.norm())


def _widened(value: Any) -> Any:
    """Arguments of a call with all floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value
