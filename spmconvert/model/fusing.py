"""Opened modules back in the form in which checkpoints of their architecture are saved.

The layers become the fused parameters again, and transformers' own mapping says what these are called in a file: for
experts mostly a tensor an expert and projection. One fused parameter is in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spmconvert.model.opened_module import OpenedModule, Part

# name, bytes and reader of a tensor
Entry = tuple[str, int, Callable[[], Tensor]]


def fused_entries(entries: Sequence[Entry], model: Any, prefixes: dict[str, str]) -> list[Entry]:
    """Tensors of a checkpoint with its opened modules fused.

    Args:
        entries: of the checkpoint, dense where layers were replaced.
        model: dense and opened, on any device; only names and shapes are read.
        prefixes: what the checkpoint calls its opened modules, by what the model calls them.
    """
    readers = {name: (size, read) for name, size, read in entries}
    last = _Last()
    closed: list[Entry] = []
    inside: set[str] = set()
    for name, prefix in prefixes.items():
        module = model.get_submodule(name)
        assert isinstance(module, OpenedModule)
        inside.add(f"{prefix}.{module.mark}")
        for parameter, parts in module.by_parameter():
            names = [f"{prefix}.{part.name}" for part in parts]
            inside.update(names)
            own = [part.fused(module.get_parameter(part.name)) for part in parts]
            shape = own[0].shape if parts[0].index is None else torch.stack(own).shape
            fused = _Fused(model, f"{prefix}.{parameter}", shape, [readers[each] for each in names], parts, last)
            closed += fused.entries()
    return [entry for entry in entries if entry[0] not in inside] + closed


@dataclass
class _Last:
    """What one fused parameter is saved as: that of the last one that was asked for."""

    of: "_Fused | None" = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Fused:
    """A fused parameter of which nothing has been read yet.

    Attributes:
        model: whose mapping says how it is saved.
        name: in the checkpoint.
        shape: of it.
        readers: bytes and reader of every part.
        parts: how they lie in it.
        last: where it is while it is written.
    """

    model: Any
    name: str
    shape: torch.Size
    readers: Sequence[tuple[int, Callable[[], Tensor]]]
    parts: Sequence[Part]
    last: _Last

    def entries(self) -> list[Entry]:
        """The tensors that it is saved as."""
        item = sum(size for size, _ in self.readers) // self.shape.numel()
        saved = self._saved_as(torch.empty(self.shape, device="meta"))
        return [(name, tensor.numel() * item, partial(self._read, name)) for name, tensor in saved.items()]

    def _read(self, name: str) -> Tensor:
        if self.last.of is not self:
            self.last.of, self.last.tensors = None, {}
            own = [part.fused(read()) for part, (_, read) in zip(self.parts, self.readers, strict=True)]
            whole = own[0] if self.parts[0].index is None else torch.stack(own)
            self.last.of, self.last.tensors = self, self._saved_as(whole)
        return self.last.tensors[name]

    def _saved_as(self, whole: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self.model, {self.name: whole})
        return found
