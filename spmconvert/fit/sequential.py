"""Fit layers one after the other on what the converted model feeds them, towards what the dense model puts out.

With x the layer's input in the dense model, z its input in the model that is converted so far, the best matrix on z is the
regression of W x on z. It takes the place of the weight in the ordinary fit, with the moments of z as statistics, so every
structure and the output metric work as they are. A ridge towards W keeps what the calibration rows hardly show; it grows
with the features to each row, since a fixed one is too small for some layers or too large for others.

The calibration rows run through the one model, a block of the module list at a time, with and without the layers that are
converted so far. Only their hidden states between two blocks are kept, and what the layers of the block at work put out, so
that the blocks' weights may stay on disk. What it gives up: targets outside of one list of blocks, experts, which see other
tokens in each run, and time.

Default under a budget, where it is better before a finetune from 10 % of the parameters on (a small GPT-2 at 10 %: 4.595
nats instead of 4.683) and about level after one. Low rank alone is worse with it, so there it is off. All figures, ridges
and the budgets at which it loses: benchmarks/results/choices.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.calibrate.statistics import ActivationStatistics, attended
from spmconvert.errors import CalibrationError, OptionError
from spmconvert.model.swap import replace_module

# what half precision may differ by between two runs, as a share of the norm
CHAIN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Regression:
    """What a layer should do with the converted model's activations.

    Attributes:
        weight: regression of the dense outputs on the inputs, [out_features, in_features].
        bias: that makes the mean output exact, [out_features].
        inputs: moments of the inputs.
    """

    weight: Tensor
    bias: Tensor
    inputs: ActivationStatistics

    def to(self, device: torch.device | str) -> "Regression":
        """The same on another device."""
        return Regression(self.weight.to(device), self.bias.to(device), self.inputs.to(device))


class _Paired:
    """Moments of inputs, and of outputs with them; those of outputs alone nobody needs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.inputs = ActivationStatistics.empty(in_features)
        self.mean = torch.zeros(out_features, dtype=torch.float32)
        self.scatter = torch.zeros(out_features, in_features, dtype=torch.float32)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        part, mean = ActivationStatistics.of(inputs), outputs.mean(0)
        self.scatter += ((outputs - mean).t() @ (inputs - part.mean)).cpu()
        part, difference = part.to("cpu"), mean.cpu() - self.mean
        share = part.rows / (self.inputs.rows + part.rows)
        # centred on the means of all rows
        self.scatter.addr_(difference, part.mean - self.inputs.mean, alpha=self.inputs.rows * share)
        self.mean += difference * share
        self.inputs.merge_(part)

    def regression(self, weight: Tensor) -> Regression:
        covariance = self.inputs.covariance.double()
        if not covariance.any():
            # constant inputs say nothing about the weight
            return Regression(weight, self.mean - weight @ self.inputs.mean, self.inputs)
        # of the mean variance: as noise of the moments grows, with unknowns to each row
        ridge = len(covariance) / self.inputs.rows * covariance.diagonal().mean()
        cross = self.scatter.double() / self.inputs.rows + ridge * weight.double()
        covariance.diagonal().add_(ridge)
        regressed = torch.linalg.solve(covariance, cross.t()).t().float()
        return Regression(regressed, self.mean - regressed @ self.inputs.mean, self.inputs)


def layer_blocks(model: Any, names: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The module list that holds all layers, and the block of every layer.

    Raises:
        OptionError: when they are not all inside of one list of blocks, or one is an expert, which sees other tokens in
            each run.
    """
    experts = [name for name in names if ".experts." in name]
    if experts:
        raise OptionError(
            f"sequential fitting needs layers that see every token, {experts[0]} is an expert; leave it out with --ignore, "
            "or choose --independent"
        )
    containers = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for container in sorted(containers, key=len):
        if all(name.startswith(f"{container}.") for name in names):
            return container, {name: int(name.removeprefix(f"{container}.").split(".")[0]) for name in names}
    raise OptionError(
        f"sequential fitting needs all layers in one list of blocks, {names[0]} and {names[-1]} have none in common; "
        "choose targets of one stack, or --independent"
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
            "fitted one after the other; choose --independent"
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
    """Calibration rows on their way through the dense and the converted model, a block at a time.

    Both are one model, in which the converted layers of the block at work take the place of dense ones for a moment.

    Every block runs once in the dense model, for the outputs of all of its layers, and in the converted model once for each
    input that layers have and once to move on.

    Args:
        model: the dense model; it is as it was between two calls.
        container: name of its list of blocks.
        batches: keyword arguments of the model.
        layers: block of every layer that is converted, by name.
    """

    def __init__(self, model: Any, container: str, batches: Sequence[dict[str, Any]], layers: Mapping[str, int]) -> None:
        self._model, self._blocks = model, model.get_submodule(container)
        check_chain(model, container, batches[0])
        self._layers = layers
        self._converted: dict[str, nn.Module] = {}
        self._masks = [batch.get("attention_mask") for batch in batches]
        self._calls = [_block_calls(model, self._blocks, batch) for batch in batches]
        # of the dense and of the converted model
        self._states = [[calls[0][0][0]] * 2 for calls in self._calls]
        self._dense_outputs: dict[str, list[Tensor]] = {}
        self._dense_next: list[Tensor] = []
        self._inputs: dict[str, list[Tensor]] = {}

    def convert(self, name: str, layer: nn.Module) -> None:
        """Put a layer of the block at work in the place of the dense one, for the converted model."""
        self._converted[name] = layer

    @torch.no_grad()
    def pairs(self, index: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of a layer of block ``index`` when converted, its dense outputs, by batch: [rows, features] each."""
        if not self._dense_next:
            self._run_dense(index)
        if name not in self._inputs:
            self._run_converted(index, name)
        for inputs, outputs in zip(self._inputs.pop(name), self._dense_outputs.pop(name), strict=True):
            if len(inputs) != len(outputs):
                raise CalibrationError(
                    f"{name} sees {len(inputs)} tokens in the converted model and {len(outputs)} in the dense one, as an "
                    "expert does; choose --independent"
                )
            yield inputs.float(), outputs.float()

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Move all rows through block ``index`` of both models."""
        if not self._dense_next:
            self._run_dense(index)
        for batch, states in enumerate(self._states):
            states[0] = self._dense_next[batch]
            with _replaced(self._model, self._converted):
                states[1] = self._run(batch, index, states[1])
        self._converted.clear()
        self._dense_outputs, self._dense_next, self._inputs = {}, [], {}

    def _run_dense(self, index: int) -> None:
        """Run a block of the dense model; its layers' outputs and the states behind it are kept until the next one."""
        names = [name for name, block in self._layers.items() if block == index]
        self._dense_outputs = {name: [] for name in names}
        for batch, (mask, states) in enumerate(zip(self._masks, self._states, strict=True)):
            with _caught(self._model, names, outputs=True) as caught:
                self._dense_next.append(self._run(batch, index, states[0]))
            for name in names:
                self._dense_outputs[name].append(attended(caught[name], mask))

    def _run_converted(self, index: int, name: str) -> None:
        """Inputs of a layer in the converted model, and of every other one that has the very same input."""
        names = [other for other in self._dense_outputs if other not in self._converted]
        for batch, (mask, states) in enumerate(zip(self._masks, self._states, strict=True)):
            with _replaced(self._model, self._converted), _caught(self._model, names, outputs=False) as caught:
                self._run(batch, index, states[1])
            inputs = attended(caught[name], mask)
            for other in names:
                if caught[other] is caught[name]:
                    self._inputs.setdefault(other, []).append(inputs)

    def _run(self, batch: int, index: int, state: Tensor) -> Tensor:
        arguments, keywords = self._calls[batch][index]
        return _state_after(self._blocks[index], state, arguments[1:], keywords)


def regress(streams: Streams, index: int, name: str, weight: Tensor) -> Regression:
    """The regression of a layer in block ``index``; all layers before it are converted.

    Args:
        streams: that have come to the block.
        index: of the block.
        name: of the layer.
        weight: its dense weight, [out_features, in_features], float32.
    """
    out_features, in_features = weight.shape
    sums = _Paired(in_features, out_features)
    for inputs, outputs in streams.pairs(index, name):
        sums.add(inputs, outputs)
    return sums.regression(weight)


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


@contextmanager
def _replaced(model: Any, layers: dict[str, nn.Module]) -> Iterator[None]:
    dense = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    try:
        yield
    finally:
        for name, layer in dense.items():
            replace_module(model, name, layer)


@contextmanager
def _caught(model: Any, names: Sequence[str], *, outputs: bool) -> Iterator[dict[str, Tensor]]:
    """What goes into layers, or comes out of them, by name."""
    caught: dict[str, Tensor] = {}

    def keep_for(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            caught[name] = output if outputs else inputs[0]

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keep_for(name)) for name in names]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
