"""Recurrences opened up: a linear layer for the inputs and one for the states of every layer and direction.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` multiply by parameters that hold all gates of a layer, which is one matrix each for
what comes in and for the state before. Opened, layer 0 of ``encoder.lstm`` has ``encoder.lstm.l0.input`` and
``encoder.lstm.l0.recurrent`` (and ``l0_reverse`` for the other direction, ``projection`` where states are projected). The
inputs of all steps go through their layer at once; the states step by step, so that a calibration sees the states that the
model really runs through. The call, the states and packed sequences are those of torch.

What it gives up: torch runs all steps in one operation of its own; a step here takes a few dozen microseconds of Python,
which narrow layers do not win back (``benchmarks.recurrence``).
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from spmconvert.model.opened_module import OpenedModule, Part

State = tuple[Tensor, ...]
# layers of an opened recurrence, and the parameters that each is made of
_LAYERS = {"input": ("weight_ih", "bias_ih"), "recurrent": ("weight_hh", "bias_hh"), "projection": ("weight_hr", None)}


class OpenedRecurrence(OpenedModule):
    """A recurrence of linear layers, with the call of the one that it was.

    Args:
        fused: an LSTM, a GRU or a plain recurrent net.

    Shape:
        as torch's: [tokens, rows, in_features], or rows first with ``batch_first``, or without rows, or packed.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTM, nn.GRU, nn.RNN)

    def __init__(self, fused: nn.Module) -> None:
        recurrence: Any = fused
        super().__init__(fused, tuple(_parts(recurrence)))
        # it lists its parameters a second time
        recurrence._flat_weights = []
        self.mode: str = recurrence.mode
        self.hidden_size: int = recurrence.hidden_size
        self.proj_size: int = recurrence.proj_size
        self.input_size: int = recurrence.input_size
        self.num_layers: int = recurrence.num_layers
        self.batch_first: bool = recurrence.batch_first
        self.dropout: float = recurrence.dropout
        self.bidirectional: bool = recurrence.bidirectional

    def is_stepwise(self, layer: str) -> bool:
        """Whether layers of a name are called for every token by itself: all that wait for the state before."""
        return layer != "input"

    def closed(self) -> nn.Module:
        """The recurrence as torch has it."""
        (recurrence,) = self._fused
        recurrence._flat_weights = [None] * len(recurrence._flat_weights_names)
        closed = super().closed()
        recurrence.flatten_parameters()
        return closed

    def flatten_parameters(self) -> None:
        """Nothing: there is no parameter that could be put beside another."""

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run all steps; input, states and results as of the module that it was."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        states = self._states(x, hx, batched=batched)
        outputs, last = self._run(x, states, None)
        outputs = outputs.transpose(0, 1) if batched and self.batch_first else outputs
        if not batched:
            outputs, last = outputs.squeeze(1), tuple(state.squeeze(1) for state in last)
        return outputs, self._given_back(last)

    def _packed(self, packed: PackedSequence, hx: Tensor | State | None) -> tuple[PackedSequence, Tensor | State]:
        x, lengths = pad_packed_sequence(packed)
        # rows are in the order of the caller again, and so are the states
        outputs, last = self._run(x, self._states(x, hx, batched=True), lengths.to(x.device))
        again = pack_padded_sequence(outputs, lengths, enforce_sorted=packed.sorted_indices is None)
        return again, self._given_back(last)

    def _given_back(self, last: State) -> Tensor | State:
        return last if self.mode == "LSTM" else last[0]

    def _states(self, x: Tensor, given: Tensor | State | None, *, batched: bool) -> State:
        """States in front of the first step, [layers * directions, rows, features]."""
        if given is None:
            count = self.num_layers * len(self._directions)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
            return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes)
        states = given if isinstance(given, tuple) else (given,)
        return states if batched else tuple(state.unsqueeze(1) for state in states)

    def _run(self, x: Tensor, states: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in self._directions:
                first = tuple(state[len(last)] for state in states)
                output, after = self._steps(f"l{layer}{direction}", x, first, lengths, backwards=bool(direction))
                outputs.append(output)
                last.append(after)
            x = torch.cat(outputs, dim=-1)
            if layer < self.num_layers - 1:
                x = dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _steps(
        self, name: str, x: Tensor, states: State, lengths: Tensor | None, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction: outputs [tokens, rows, features] and the states behind the last step of every row."""
        layers: Any = self._modules[name]
        given = layers.input(x)
        outputs: list[Tensor] = []
        order = range(len(x) - 1, -1, -1) if backwards else range(len(x))
        for step in order:
            after = self._step(layers, given[step], states)
            if lengths is not None:
                runs = (step < lengths)[:, None]
                states = tuple(torch.where(runs, new, old) for new, old in zip(after, states, strict=True))
                outputs.append(torch.where(runs, states[0], 0.0))
            else:
                states = after
                outputs.append(states[0])
        return torch.stack(outputs[::-1] if backwards else outputs), states

    def _step(self, layers: Any, given: Tensor, states: State) -> State:
        recurrent = layers.recurrent(states[0])
        if self.mode == "LSTM":
            entering, keeping, new, leaving = (given + recurrent).chunk(4, dim=-1)
            cell = keeping.sigmoid() * states[1] + entering.sigmoid() * new.tanh()
            hidden = leaving.sigmoid() * cell.tanh()
            return (layers.projection(hidden) if self.proj_size else hidden), cell
        if self.mode == "GRU":
            reset, update, new = given.chunk(3, dim=-1)
            own_reset, own_update, own_new = recurrent.chunk(3, dim=-1)
            share = (update + own_update).sigmoid()
            candidate = (new + (reset + own_reset).sigmoid() * own_new).tanh()
            return (candidate + share * (states[0] - candidate),)
        total = given + recurrent
        return (total.relu() if self.mode == "RNN_RELU" else total.tanh(),)


def _parts(recurrence: Any) -> Iterator[Part]:
    for layer in range(recurrence.num_layers):
        for direction in ("", "_reverse") if recurrence.bidirectional else ("",):
            for name, (weight, bias) in _LAYERS.items():
                if name == "projection" and not recurrence.proj_size:
                    continue
                yield Part(f"l{layer}{direction}.{name}.weight", f"{weight}_l{layer}{direction}")
                if recurrence.bias and bias is not None:
                    yield Part(f"l{layer}{direction}.{name}.bias", f"{bias}_l{layer}{direction}")
