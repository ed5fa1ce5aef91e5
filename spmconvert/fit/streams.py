"""Calibration rows on their way through the dense model and the converted one, a block of a list of blocks at a time.

Whatever is fitted to what the converted model feeds it (``sequential``), or trained to make up for it (``refine``), needs
the rows as they reach a block in both models. There is one model; the block at work is copied, its layers are replaced in
the copy, and the copy is what the converted model runs. Only the hidden states between two blocks are kept, and what the
layers of the block at work put out, so that the blocks' weights may stay on disk.

What it gives up: targets outside of one list of blocks, and experts, which see other tokens in each of the two models.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.statistics import attended
from spmconvert.errors import CalibrationError, OptionError
from spmconvert.model.recording import recorded
from spmconvert.model.swap import replace_module
from spmconvert.operator.offloaded import fetched

# what half precision may differ by between two runs, as a share of the norm
CHAIN_TOLERANCE = 0.01


def layer_blocks(model: Any, names: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The module list that holds all layers, and the block of every layer.

    Raises:
        OptionError: when they are not all inside of one list of blocks, or one is an expert, which sees other tokens in
            each run.
    """
    experts = [name for name in names if ".experts." in name]
    if experts:
        raise OptionError(
            f"fits in sequence and refinement need layers that see every token, {experts[0]} is an expert; leave it out "
            "with --ignore, or choose --independent and --refine 0"
        )
    containers = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for container in sorted(containers, key=len):
        if all(name.startswith(f"{container}.") for name in names):
            return container, {name: int(name.removeprefix(f"{container}.").split(".")[0]) for name in names}
    raise OptionError(
        f"fits in sequence and refinement need all layers in one list of blocks, {names[0]} and {names[-1]} have none in "
        "common; choose targets of one stack, or --independent and --refine 0"
    )


def on_one_path(model: Any, names: Sequence[str]) -> bool:
    """Whether all layers are in one list of blocks, and none is an expert."""
    try:
        layer_blocks(model, names)
    except OptionError:
        return False
    return True


def check_chain(model: Any, container: str, batch: dict[str, Any]) -> None:
    """Refuse blocks that are no chain.

    Raises:
        OptionError: when they are none.
    """
    if not is_chain(model, container, batch):
        raise OptionError(
            f"the blocks of {container} do not each take what the one before them puts out, so their layers cannot be "
            "fitted one after the other, nor refined; choose --independent and --refine 0"
        )


@torch.no_grad()
def is_chain(model: Any, container: str, batch: dict[str, Any]) -> bool:
    """Whether blocks are called once each and take what the one before puts out, by the first row of a batch."""
    blocks = model.get_submodule(container)
    row = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    calls = _block_calls(model, blocks, row, states=True)
    if len(calls) != len(blocks) or not all(isinstance(call[0][0], Tensor) for call in calls):
        return False
    states = [_state_after(block, call[0][0], call[0][1:], call[1]) for block, call in zip(blocks, calls, strict=True)]
    return all(map(_agree, states, (call[0][0] for call in calls[1:])))


@torch.no_grad()
def calling_order(model: Any, names: Sequence[str], batch: dict[str, Any]) -> list[str]:
    """Layers in the order in which a forward pass calls them first; a model may register them in another one."""
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)) for name in names
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [*order, *(name for name in names if name not in order)]


class Streams:
    """Calibration rows in front of one block, in the dense and in the converted model.

    Every block runs once in the dense model, for the outputs of all of its layers, and in the converted model once for each
    input that layers have and once to move on.

    Args:
        model: the dense model, which stays as it is.
        container: name of its list of blocks.
        batches: keyword arguments of the model.
        names: all layers that are converted.
        pairs: whether ``pairs`` will be asked for; the outputs of a block's layers are kept for it.

    Attributes:
        index: position of the block at work.
        states: what goes into it, by batch: in the dense model, and in the converted one.
        masks: which tokens are no padding, by batch; None for all.
    """

    def __init__(
        self, model: Any, container: str, batches: Sequence[dict[str, Any]], names: Sequence[str], *, pairs: bool = True
    ) -> None:
        check_chain(model, container, batches[0])
        self.index = 0
        self.masks: list[Tensor | None] = [batch.get("attention_mask") for batch in batches]
        self._blocks, self._container, self._names = model.get_submodule(container), container, names
        self._keeps_outputs = pairs
        self._calls = [_block_calls(model, self._blocks, batch) for batch in batches]
        self.states: list[tuple[Tensor, Tensor]] = [(calls[0][0][0],) * 2 for calls in self._calls]
        self._norms = _reading_norms(model, self._blocks, batches[0])
        self._forget()

    def _forget(self) -> None:
        self._copy: nn.Module | None = None
        self._waiting: set[str] = set()
        self._dense_outputs: dict[str, list[Tensor]] = {}
        self._dense_after: list[Tensor] = []
        self._inputs: dict[str, list[Tensor]] = {}

    @property
    def block(self) -> nn.Module:
        """The block at work of the converted model, a copy with its tensors in memory, float32."""
        if self._copy is None:
            self._copy = copy_of_block(self._blocks[self.index]).float()
            self._waiting = set(self._here())
        return self._copy

    def _here(self) -> list[str]:
        """Layers of the block at work, by their names inside of it."""
        return [self.inner_name(name) for name in self._names if name.startswith(self.full_name(""))]

    def full_name(self, name: str) -> str:
        """The model's name for something inside of the block at work."""
        return f"{self._container}.{self.index}.{name}"

    def inner_name(self, name: str) -> str:
        """The block's own name for something that the model calls ``name``."""
        return name.removeprefix(self.full_name(""))

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
                    "expert does; choose --independent and --refine 0"
                )
            yield inputs.float(), outputs.float()

    def run(self, batch: int) -> Tensor:
        """What the converted model's block makes of a batch, float32; differentiable in the block's parameters."""
        arguments, keywords = self._calls[batch][self.index]
        return _state_after(self.block, self.states[batch][1].float(), _widened(arguments[1:]), _widened(keywords))

    def reading_norm(self) -> nn.Module | None:
        """The norm through which everything behind the block reads what it puts out, float32; None where there is none."""
        norm = self._norms[self.index]
        return None if norm is None else copy_of_block(norm).float()

    @torch.no_grad()
    def dense_after(self) -> list[Tensor]:
        """What the dense model's block puts out, by batch; its layers' outputs are kept until the next one."""
        if not self._dense_after:
            names, block = self._here() if self._keeps_outputs else [], self._blocks[self.index]
            self._dense_outputs = {name: [] for name in names}
            for batch, mask in enumerate(self.masks):
                with recorded(block, names, "outputs") as caught:
                    self._dense_after.append(self._run_dense(batch, self.states[batch][0]))
                for name in names:
                    self._dense_outputs[name].append(attended(caught[name], mask))
        return self._dense_after

    @torch.no_grad()
    def advance(self) -> None:
        """Move all rows through the block at work of both models."""
        states = []
        for batch, after in enumerate(self.dense_after()):
            if self._copy is None:
                converted = self._run_dense(batch, self.states[batch][1].to(after.dtype))
            else:
                converted = self.run(batch)
            states.append((after, converted))
        self.states = states
        self.index += 1
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

    def _run_dense(self, batch: int, state: Tensor) -> Tensor:
        arguments, keywords = self._calls[batch][self.index]
        return _state_after(self._blocks[self.index], state, arguments[1:], keywords)


def copy_of_block(block: nn.Module) -> nn.Module:
    """A copy of a block with its tensors in memory, wherever accelerate keeps them, that nobody watches."""
    with fetched(nn.ModuleList([block])):
        hooks = [module.__dict__["_hf_hook"] for module in block.modules() if "_hf_hook" in module.__dict__]
        copied = copy.deepcopy(block, {id(hook): hook for hook in hooks})
    for module in copied.modules():
        for name in ("_hf_hook", "_old_forward", "forward"):
            module.__dict__.pop(name, None)
    return copied.requires_grad_(False)


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _state_after(block: nn.Module, state: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    output = block(state, *arguments, **keywords)
    state_after: Tensor = output if isinstance(output, Tensor) else output[0]
    return state_after


def _agree(state: Tensor, wanted: Tensor) -> bool:
    return state.shape == wanted.shape and bool((state - wanted).norm() <= CHAIN_TOLERANCE * wanted.norm())


def _block_calls(model: Any, blocks: nn.ModuleList, batch: dict[str, Any], *, states: bool = False) -> list[_Call]:
    """How the model calls its blocks for a batch; the state that moves on is the first argument.

    It is None in all calls but the first, unless ``states`` are asked for: they are computed here, block by block.
    """
    calls: list[_Call] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        others = dict(keywords)
        state, *rest = arguments or (others.pop("hidden_states", None),)
        calls.append(((state if states or not calls else None, *rest), others))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _widened(value: Any) -> Any:
    """Arguments of a call with all floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


@torch.no_grad()
def _reading_norms(model: Any, blocks: nn.ModuleList, batch: dict[str, Any]) -> list[nn.Module | None]:
    """For every block the first module that takes what it puts out, where that has vectors for parameters alone."""
    outputs: list[Tensor] = []
    readers: list[nn.Module | None] = [None] * len(blocks)

    def note_output(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    def note_reader(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if outputs and inputs and inputs[0] is outputs[-1]:
            readers[len(outputs) - 1] = readers[len(outputs) - 1] or module

    handles = [block.register_forward_hook(note_output) for block in blocks]
    for module in model.modules():
        own = list(module.parameters())
        if own and all(parameter.dim() == 1 for parameter in own):
            handles.append(module.register_forward_pre_hook(note_reader))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return readers
