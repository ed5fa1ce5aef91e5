"""Merged blocks that are kept between calls, and how a change of the parameters they were made from is seen.

Numbers are not compared, which would cost as much as a call. A parameter is what it was if it is the same tensor object on
the same storage, laid out in the same way, with the same version counter. Addresses alone do not do for that: freed memory
is given out again, and a new parameter may lie where the old one lay. Both references are weak, so that blocks never keep
a parameter's memory alive.

What it gives up: only parameters are followed, and buffers that a module names. A tensor that is computed at every access
(a parametrization), swapped in for a call (``torch.func.functional_call``), or gathered for one (FSDP, whose copies into
it count as no version) is merged at every call. A write through ``parameter.data`` counts as no version either and is not
seen. And ``torch.utils.swap_tensors`` refuses a tensor that has weak references: blocks have to be dropped before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from spmconvert.operator.reference import is_transformed

Merge = Callable[..., Any]


class Source:
    """A parameter as it was when blocks were made from it."""

    def __init__(self, parameter: Tensor) -> None:
        self._tensor = TensorWeakRef(parameter)
        # what a weak reference points to is not given out again, unlike the memory that the numbers stood in
        self._storage = StorageWeakRef(parameter.untyped_storage())
        self._layout = _layout(parameter)

    def still_is(self, parameter: Tensor) -> bool:
        """Whether the parameter is this tensor, with nothing written to it since that counts as a version."""
        if self._tensor() is not parameter or self._layout != _layout(parameter):
            return False
        same: bool = self._storage.cdata == parameter.untyped_storage()._cdata
        return same


def _layout(parameter: Tensor) -> tuple[Any, ...]:
    offset, strides = parameter.storage_offset(), parameter.stride()
    return parameter._version, parameter.dtype, parameter.device, offset, strides


@dataclass(frozen=True, eq=False)
class KeptBlocks:
    """Blocks, and all that they depend on.

    Attributes:
        blocks: what ``merge`` returned, in ``dtype``: tensors, or modules that hold them.
        dtype: dtype of the blocks.
        merge: function that merged.
        sources: the parameters that were merged.
    """

    blocks: list[Any]
    dtype: torch.dtype
    merge: Merge
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, blocks: list[Any], dtype: torch.dtype, merge: Merge, parameters: Sequence[Tensor]) -> Self:
        """Keep blocks that were just merged from parameters that ``can_be_kept``."""
        return cls(blocks, dtype, merge, tuple(map(Source, parameters)))

    def serve(self, dtype: torch.dtype, merge: Merge, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the blocks that merging would give now."""
        if self.dtype != dtype or self.merge is not merge:
            return False
        return all(source.still_is(parameter) for source, parameter in zip(self.sources, parameters, strict=True))


class Keeper(nn.Module):
    """A module that keeps what it makes from its parameters for the calls that follow."""

    _cache: KeptBlocks | None = None

    def keep(self, dtype: torch.dtype, merge: Merge, tensors: Sequence[Tensor], make: Callable[[], list[Any]]) -> list[Any]:
        """What ``make`` gives, made anew only after a change.

        Args:
            dtype: that it is in.
            merge: what makes it, the same object for the same way.
            tensors: that it is made from; they ``can_be_kept``.
            make: makes it.
        """
        kept = self._cache
        if kept is None or not kept.serve(dtype, merge, tensors):
            # what is made inside inference mode could not be used outside of it
            with torch.inference_mode(False), torch.no_grad():
                kept = KeptBlocks.of(make(), dtype, merge, tensors)
            # also what children kept on the way
            self.drop_cache_()
            self._cache = kept
        return kept.blocks

    def drop_cache_(self) -> None:
        """Forget what was kept, by the modules inside of this one, too."""
        self._cache = None
        for child in self.children():
            if isinstance(child, Keeper):
                child.drop_cache_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Drop it with every conversion: tensors with weak references cannot be swapped for others."""
        self.drop_cache_()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Drop it: tensors with weak references cannot be swapped, which is one way to load."""
        self.drop_cache_()
        super()._load_from_state_dict(*arguments, **options)

    def train(self, mode: bool = True) -> Self:
        """Set the mode and drop what was kept."""
        self.drop_cache_()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was kept out of pickles and copies."""
        return {**self.__dict__, "_cache": None}


def can_be_kept(module: nn.Module, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
    """Whether what is made from a module's tensors may be kept, because a change of them would be seen.

    Args:
        module: whose tensors they are.
        parameters: followed only while they are parameters, not computed or swapped in.
        buffers: tensors that are no parameters to begin with; any that counts its versions is followed.
    """
    # inference tensors have no version counter
    counted = not any(tensor.is_inference() for tensor in (*parameters, *buffers))
    followed = counted and all(isinstance(parameter, nn.Parameter) for parameter in parameters)
    gathered = getattr(module, "_is_fsdp_managed_module", False)
    # what is computed inside of torch.func.grad and its kin belongs to the transform and must not outlive it
    return followed and not gathered and not is_transformed()
