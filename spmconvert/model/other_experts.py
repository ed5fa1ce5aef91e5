"""Experts that are fused in other ways than most: one projection by itself, and such as every token goes through.

JetMoE holds each projection of its experts, of feed-forward and attention alike, in a module of its own, which is handed
tokens sorted by expert. Inkling holds its shared experts fused, with gates apart from what they gate. As with other experts
it is the parameters and the call that tell them, not the name of a model.

A projection by itself is not told which tokens its rows are; the router beside it says so, and is asked while moments
are gathered.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spmconvert.model.opened_module import OpenedModule, Part, Routed

# layers of shared experts and the parameters that they are fused in
_SHARED = {"gating": "gate_proj", "up": "up_proj", "down": "down_proj"}


class OpenedProjection(OpenedModule):
    """One projection of all experts [experts, out_features, in_features] as one layer an expert, with the same call.

    Args:
        fused: whose parameter the new layers are views of.
        chosen: how many experts a token is given to; None for all.
    """

    alike = True

    def __init__(self, fused: nn.Module, chosen: int | None) -> None:
        count = len(fused.get_parameter("weight"))
        super().__init__(fused, tuple(Part(f"{index}.expert.weight", "weight", index) for index in range(count)))
        self.share = min(1.0, (chosen or count) / count)
        self._sorted: Routed | None = None

    @staticmethod
    def opens(module: nn.Module) -> bool:
        """Whether a module is one."""
        return _is_fused(module, ["weight"]) and _call_of(module) == ["inputs", "expert_size"]

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """What each expert makes of its rows.

        Args:
            inputs: [rows, in_features], sorted by expert.
            expert_size: how many rows each expert has.

        Returns:
            [rows, out_features], in the same order.
        """
        sizes, outputs = list(expert_size), list[Tensor]()
        routed: list[Routed | None] = [None] * len(sizes)
        if self._sorted is not None:
            routed = [Routed(part, self._sorted.tokens) for part in self._sorted.positions.split(sizes)]
            # of the next call nothing is known until the router has run again
            self._sorted = None
        for expert, rows, own in zip(self.children(), inputs.split(sizes), routed, strict=True):
            if len(rows):
                self.routed = own
                outputs.append(expert.get_submodule("expert")(rows))
        return torch.cat(outputs)

    def watch(self, around: nn.Module) -> list[RemovableHandle]:
        """Ask the router in the module around for the tokens that rows are."""

        def note(_: nn.Module, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            # order of choices, tokens in that order, their weights, how many each expert has, logits
            self._sorted = Routed(output[1], len(arguments[0]))

        return [around.get_submodule("router").register_forward_hook(note)]


class OpenedSharedExperts(OpenedModule):
    """Fused experts that every token goes through as one module an expert, with the same call.

    Args:
        fused: whose parameters the new layers are views of.
    """

    alike = True

    def __init__(self, fused: nn.Module) -> None:
        count = len(fused.get_parameter(_SHARED["up"]))
        super().__init__(
            fused,
            tuple(
                Part(f"{index}.{name}.weight", parameter, index)
                for name, parameter in _SHARED.items()
                for index in range(count)
            ),
        )

    @staticmethod
    def opens(module: nn.Module) -> bool:
        """Whether a module is one."""
        return _is_fused(module, list(_SHARED.values())) and _call_of(module) == ["hidden_states", "gammas"]

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        """What the experts make of tokens, added up.

        Args:
            hidden_states: [..., in_features].
            gammas: weight of each expert, [..., experts].

        Returns:
            As ``hidden_states``.
        """
        rows, (fused,) = hidden_states.flatten(0, -2), self._fused
        weights, outputs = gammas.reshape(len(rows), -1), list[Tensor]()
        for number, expert in enumerate(self.children()):
            gating, up, down = (expert.get_submodule(name) for name in _SHARED)
            outputs.append(down(fused.act_fn(gating(rows)) * up(rows) * weights[:, number, None]).float())
        return torch.stack(outputs).sum(0).to(hidden_states.dtype).view(hidden_states.shape)


def _is_fused(module: nn.Module, parameters: Sequence[str]) -> bool:
    """Whether a module's parameters are these, each three-dimensional."""
    own = dict(module.named_parameters(recurse=False))
    return set(own) == set(parameters) and all(parameter.dim() == 3 for parameter in own.values())


def _call_of(module: nn.Module) -> list[str]:
    """Names of what a module is called with."""
    return list(inspect.signature(module.forward).parameters)
