"""The simplest way to make a model faster: leave out the run of blocks that it misses least.

That is the run without which the last hidden state, on calibration rows, keeps the most of its direction. Nothing is
fitted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from spmconvert.model.chain import common_list
from spmconvert.model.swap import copy_sharing_tensors, replace_module


@dataclass(frozen=True)
class Shortened:
    """A model without a run of blocks.

    Attributes:
        model: the model, sharing all tensors with the whole one.
        first: the first block that is left out.
        count: how many are.
        names: layers of the left-out blocks, of those that were asked for.
    """

    model: Any
    first: int
    count: int
    names: frozenset[str]


def drop_blocks(dense: Any, targets: list[str], dropped: float, rows: Tensor) -> Shortened:
    """Leave out as many blocks as come nearest to a number of parameters; as ``drop_run``.

    Args:
        dense: a causal language model.
        targets: layers in all of its blocks.
        dropped: parameters to leave out.
        rows: token ids that the run is chosen on, [rows, tokens].
    """
    container, _ = _blocks_of(dense, targets)
    block = sum(parameter.numel() for parameter in dense.get_submodule(container)[0].parameters())
    return drop_run(dense, targets, max(1, round(dropped / block)), rows)


def _blocks_of(dense: Any, targets: list[str]) -> tuple[str, dict[str, int]]:
    found = common_list(dense, targets)
    assert found is not None, "the targets are in one list of blocks"
    return found


@torch.no_grad()
def drop_run(dense: Any, targets: list[str], count: int, rows: Tensor) -> Shortened:
    """Leave out a run of so many blocks, with neither the first nor the last one; other arguments as ``drop_blocks``."""
    container, places = _blocks_of(dense, targets)
    blocks = dense.get_submodule(container)
    wanted = _hidden(dense, rows)

    def without(first: int) -> Any:
        model = copy_sharing_tensors(dense)
        kept = [block for index, block in enumerate(blocks) if not first <= index < first + count]
        replace_module(model, container, nn.ModuleList(kept))
        return model

    def likeness(first: int) -> float:
        return cosine_similarity(_hidden(without(first), rows), wanted, dim=-1).mean().item()

    best = max(range(1, max(2, len(blocks) - count)), key=likeness)
    names = frozenset(name for name, index in places.items() if best <= index < best + count)
    return Shortened(without(best), best, count, names)


def _hidden(model: Any, rows: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
    return states
