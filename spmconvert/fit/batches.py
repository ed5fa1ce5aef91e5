"""Which layers are fitted together: those of one shape and the same terms, but for ranks, on a GPU.

A batch rounds by who is in it, so batches are formed from all that a run fits and never from what is missing, a run keeps
them for those that go on from it (``stored``), and all of several processes take those of the first. How many fit into
the memory that is free is rounded down to a power of two, so that a little more or less of it makes no other bytes.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from spmconvert.operator.design import Design

Item = TypeVar("Item")
# members beyond which a GPU is busy; of the memory that is free, what a batch may take
MOST_MEMBERS, MEMORY_SHARE = 32, 0.5
# float32 numbers of a member at the same time: matrices of its inputs (moments, roots, their copies), of rows by outputs
# (targets, outputs and gradients on their way through the terms), and vectors of its unknowns (Adam's, L-BFGS's pairs)
INPUT_MATRICES, OUTPUT_MATRICES, UNKNOWN_VECTORS = 10, 16, 32
FLOAT_BYTES = 4


def in_batches(
    items: Sequence[Item], design_of: Callable[[Item], Design], device: str, size: int | None = None
) -> list[list[Item]]:
    """Divide items into batches of layers that can be solved together, in the order of their first ones.

    Args:
        items: what is fitted.
        design_of: gives an item's design.
        device: where; one by one on any but CUDA.
        size: members of a batch, in place of what the device has room for.
    """
    groups: dict[object, list[Item]] = {}
    for place, item in enumerate(items):
        # closed forms are solved one by one
        together = design_of(item).is_iterative
        groups.setdefault(shape_of(design_of(item)) if together else place, []).append(item)
    batches = []
    for members in groups.values():
        most = size or max(1, min(members_that_fit(design_of(item), device) for item in members))
        batches += [members[first : first + most] for first in range(0, len(members), most)]
    places = {id(item): place for place, item in enumerate(items)}
    return sorted(batches, key=lambda batch: places[id(batch[0])])


def may_batch(device: str, size: int | None = None) -> bool:
    """Whether there are batches of more than one on a device; ``size`` as for ``in_batches``."""
    return size is not None or torch.device(device).type == "cuda"


def shape_of(design: Design) -> tuple[object, ...]:
    """What layers have in common that can be solved together."""
    return design.in_features, design.out_features, tuple(term.batch_form() for term in design.terms)


def members_that_fit(design: Design, device: str) -> int:
    """How many layers of a design are fitted together on a device: a power of two, one on any but CUDA."""
    if not may_batch(device):
        return 1
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    # what torch holds without using it is free, too
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return power_of_two(min(MOST_MEMBERS, int(MEMORY_SHARE * free) // member_bytes(design)))


def power_of_two(number: int) -> int:
    """The largest power of two that is not above a number; at least one."""
    return 1 << max(0, number.bit_length() - 1)


def member_bytes(design: Design) -> int:
    """What a layer takes at most while a batch is solved; as estimated from what is held, not as measured on a GPU."""
    rows, wide = design.in_features, max(design.in_features, design.out_features)
    numbers = INPUT_MATRICES * rows**2 + OUTPUT_MATRICES * rows * wide
    return FLOAT_BYTES * (numbers + UNKNOWN_VECTORS * design.parameter_count(bias=False))
