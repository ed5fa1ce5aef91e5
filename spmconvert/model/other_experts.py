"""Experts that are fused in other ways than most: one projection by itself, and such as every token goes through.

JetMoE holds each projection of its experts, of feed-forward and attention alike, in a module of its own, which is handed
tokens sorted by expert. Inkling holds its shared experts fused, with gates apart from what they gate. As with other experts
it is the parameters and the call that tell them, not the name of a model.

What it gives up: that a projection by itself is not told which tokens its rows are. Padding counts in its moments where
rows are padded, which those of texts are not.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spmconvert.model.opened_module import OpenedModule, Part

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
        routed = zip(self.children(), inputs.split(list(expert_size)), strict=True)
        return torch.cat([expert.get_submodule("expert")(rows) for expert, rows in routed if len(rows)])


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
        weights, outputs = gammas.reshape(len(rows), -1), []
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
