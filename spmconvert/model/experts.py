"""Experts of a mixture opened up: one linear layer an expert and projection, in the place of parameters fused over all.

transformers keeps the experts of a block in three-dimensional parameters, one a projection, whatever a checkpoint has.
What a tool knows about layers (hooks, names, shapes) does not reach into them. Opened, expert 3 of the experts
``model.layers.0.mlp.experts`` has the layers ``model.layers.0.mlp.experts.3.gate_up`` and ``.down``, which are calibrated,
fitted, replaced and measured like any other; the gate and what it gates are one matrix, as in the fused parameter. The
layers of an opened model are views of the fused parameters until they are replaced (``opened_module``).

Which parameters there are, how they lie and how a gate is applied is asked of the module, by the flags that transformers
sets on it, its shapes and what it is called with, and not looked up by the name of a model. A norm behind each expert is
kept under its own name. Experts that hand a token on as it is (LongCat-Flash) have no layers; what nothing multiplies by,
which such models have in a fused parameter, is kept as it is (``Part.idle``).

What it gives up: opened experts run in a loop, as in the eager implementation, which is what calibration and fits need;
those of a converted model are stacked (``stacked_experts``). Fused experts that do not say how they apply a gate stay
fused.
"""

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.model.opened_module import OpenedModule, Part, Routed
from spmconvert.operator.reference import is_recorded

# experts that transformers does not decorate: they get all tokens for every expert, zeros where it was not chosen
_BATCHED = ("Llama4TextExperts",)
# what fused experts are called with
_CALL = ["hidden_states", "top_k_index", "top_k_weights"]
# how many experts a token is given to, as configs call it
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Projection:
    """One projection of fused experts.

    Attributes:
        name: of the layer of every opened expert.
        parameter: fused over all experts, [experts, out_features, in_features] or transposed.
        bias: the same for biases [experts, out_features], or None.
        transposed: whether the parameter is [experts, in_features, out_features].
    """

    name: str
    parameter: str
    bias: str | None
    transposed: bool

    def parts(self, count: int, experts: int) -> Iterator[Part]:
        """The tensors of so many entries of the parameter; those behind the experts are idle."""
        for index in range(count):
            yield Part(f"{index}.{self.name}.weight", self.parameter, index, self.transposed, idle=index >= experts)
            if self.bias is not None:
                yield Part(f"{index}.{self.name}.bias", self.bias, index)


def projections(module: nn.Module) -> tuple[Projection, ...]:
    """The projections of fused experts, in the order in which they are called; none for any other module."""
    first = ("up", "up_proj") if getattr(module, "has_gate", True) is False else ("gate_up", "gate_up_proj")
    transposed = _is_transposed(module, first[1], "down_proj")
    if transposed is None:
        return ()
    has_bias = getattr(module, "has_bias", False)
    return tuple(
        Projection(name, parameter, f"{parameter}_bias" if has_bias else None, transposed)
        for name, parameter in (first, ("down", "down_proj"))
    )


def _is_transposed(module: nn.Module, first: str, second: str) -> bool | None:
    """Whether the parameters of fused experts are [experts, in_features, out_features]; None for what cannot be opened."""
    gate_up, down = (getattr(module, name, None) for name in (first, second))
    if not all(isinstance(parameter, nn.Parameter) and parameter.dim() == 3 for parameter in (gate_up, down)):
        return None
    if type(module).__name__ in _BATCHED:
        return True
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    # not decorated: the call and the shapes have to be those of all others, and the gate a known one
    if list(inspect.signature(module.forward).parameters) != _CALL or not (
        hasattr(module, "_apply_gate") or _zeros(module)
    ):
        return None
    assert gate_up is not None
    assert down is not None
    hidden, inner = down.shape[1:]
    return False if gate_up.shape[1:] == (2 * inner, hidden) else None


def _zeros(module: nn.Module) -> int:
    """How many experts behind those with parameters hand a token on as it is."""
    return getattr(module, "zero_expert_num", 0)


class ExpertsCall(nn.Module):
    """The call of transformers' experts, whatever runs them.

    Attributes:
        batched: whether tokens come sorted by expert, as Llama 4 gives them.
    """

    batched: bool

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """What the chosen experts make of tokens, added up by weight.

        Args:
            hidden_states: [tokens, in_features]; where no choice is given, [experts * tokens, in_features] with zeros for
                tokens that an expert was not chosen for.
            top_k_index: experts of every token, [tokens, chosen].
            top_k_weights: their weights.

        Returns:
            [tokens, in_features], or as many rows as there were where no choice is given.
        """
        if self.batched:
            return self._each_its_own(hidden_states)
        assert top_k_index is not None
        assert top_k_weights is not None
        return self._chosen(hidden_states, top_k_index, top_k_weights).to(hidden_states.dtype)

    @abstractmethod
    def _chosen(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the chosen experts make of tokens [tokens, in_features], by index and weights [tokens, chosen]."""

    @abstractmethod
    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        """What every expert makes of its share of the rows [experts * tokens, in_features]."""


def added_up(outputs: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Outputs of experts, sorted by expert, back in the order of their tokens and added up in it: the same on every run.

    Args:
        outputs: [tokens * chosen, out_features].
        order: where each was among all choices, [tokens * chosen].
        weights: of the choices, [tokens, chosen].

    Returns:
        [tokens, out_features].
    """
    weighted = outputs * weights.reshape(-1)[order, None]
    return torch.empty_like(weighted).index_copy(0, order, weighted).view(*weights.shape, -1).sum(1)


class OpenedExperts(ExpertsCall, OpenedModule):
    """Fused experts as one module an expert, with the same call.

    Args:
        fused: whose parameters the new layers are views of.
        chosen: how many experts a token is given to; None for all.
    """

    alike = True
    stacks = True

    def __init__(self, fused: nn.Module, chosen: int | None) -> None:
        form = projections(fused)
        entries = [len(getattr(fused, one.parameter)) for one in form]
        count = min(entries)
        super().__init__(fused, tuple(p for one, own in zip(form, entries, strict=True) for p in one.parts(own, count)))
        self.count, self.zeros = count, _zeros(fused)
        self.share = min(1.0, (chosen or count) / (count + self.zeros))
        self.norm = "post_expert_norm" if getattr(fused, "has_post_expert_norm", False) else None
        if self.norm is not None:
            self.add_module(self.norm, getattr(fused, self.norm))
        self.names = tuple(projection.name for projection in form)
        self.batched = type(fused).__name__ in _BATCHED

    @property
    def implementation(self) -> str | None:
        """What the model's config says that experts are run by, as it is now; None where it says nothing."""
        return getattr(getattr(self._fused[0], "config", None), "_experts_implementation", None)

    @property
    def experts(self) -> list[nn.Module]:
        """One module an expert, in order."""
        return list(self.children())[: self.count]

    def _chosen(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if is_recorded():
            return self._all(hidden_states, index, weights)
        order = index.reshape(-1).argsort(stable=True)
        counts = index.reshape(-1).bincount(minlength=self.count + self.zeros).tolist()
        passed_on = sum(counts[self.count : self.count + self.zeros])
        *routed, passed = (order // index.shape[1]).split([*counts[: self.count], passed_on])
        outputs = [
            self._run(expert, hidden_states, own) for expert, own in zip(self.experts, routed, strict=True) if len(own)
        ]
        return added_up(torch.cat([*outputs, hidden_states[passed]]), order, weights)

    def _all(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same with every token through every expert: what is written down must not depend on values."""
        given = weights.new_zeros(len(index), self.count + self.zeros).scatter_add(1, index, weights)
        outputs = [
            self._run(expert, hidden_states) * share[:, None]
            for expert, share in zip(self.experts, given[:, : self.count].unbind(1), strict=True)
        ]
        if self.zeros:
            outputs.append(hidden_states * given[:, self.count :].sum(1, keepdim=True))
        return torch.stack(outputs).sum(0)

    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        outputs = []
        for expert, rows in zip(self.experts, hidden_states.chunk(len(self.experts)), strict=True):
            if is_recorded():
                outputs.append(self._run(expert, rows))
                continue
            routed = rows.any(1).nonzero()[:, 0]
            found = self._run(expert, rows, routed)
            outputs.append(found.new_zeros(len(rows), found.shape[1]).index_copy(0, routed, found))
        return torch.cat(outputs)

    def _run(self, expert: nn.Module, hidden_states: Tensor, positions: Tensor | None = None) -> Tensor:
        """What an expert makes of the tokens at some positions, or of all."""
        rows = hidden_states if positions is None else hidden_states[positions]
        self.routed = None if positions is None else Routed(positions, len(hidden_states))
        first, down = (getattr(expert, name) for name in self.names)
        output: Tensor = down(self.gated(first(rows)))
        return output if self.norm is None else self.get_submodule(self.norm)(output)

    def gated(self, outputs: Tensor) -> Tensor:
        """What goes into the last projection."""
        (fused,) = self._fused
        if self.names[0] == "up":
            gated: Tensor = fused.act_fn(outputs)
        elif hasattr(fused, "_apply_gate"):
            gated = fused._apply_gate(outputs)
        else:
            gate, up = outputs.chunk(2, dim=-1)
            gated = up * fused.act_fn(gate)
        return gated


def chosen_experts(around: nn.Module, config: Any) -> int | None:
    """How many experts a token is given to: what the router beside them says, or the config; None where neither does."""
    for module in (around, *around.children()):
        chosen = getattr(module, "top_k", None)
        if isinstance(chosen, int):
            return chosen
    for known in filter(None, (getattr(around, "config", None), config)):
        text = known.get_text_config() if hasattr(known, "get_text_config") else known
        for name in _CHOSEN:
            if isinstance(chosen := getattr(text, name, None), int):
                return chosen
    return None
