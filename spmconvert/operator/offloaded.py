"""Modules whose parameters accelerate keeps on disk, or in another memory, but for the time of their own calls.

A layer reads the parameters of its terms without calling them, so it fetches them first: outside of their calls they are on
the meta device, where a product has no numbers and raises no error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import nn


def may_be_offloaded(module: nn.Module) -> bool:
    """Whether accelerate watches a module; those that it does not watch have their parameters."""
    return "_hf_hook" in module.__dict__


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Have the parameters of all modules inside of one where they are computed with."""
    absent = [inner for inner in module.modules() if inner is not module and _is_absent(inner)]
    watched = {}
    try:
        for inner in absent:
            inner._hf_hook.pre_forward(inner)  # type: ignore[operator, union-attr]
            # a call on the way would put them away again
            watched[inner] = inner.__dict__.pop("forward")
        yield
    finally:
        for inner, forward in watched.items():
            inner.forward = forward
            inner._hf_hook.post_forward(inner, None)  # type: ignore[operator, union-attr]


def _is_absent(module: nn.Module) -> bool:
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return may_be_offloaded(module) and "forward" in module.__dict__ and any(tensor.is_meta for tensor in own)
