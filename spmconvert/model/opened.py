"""A checkpoint whose fused parameters are read layer by layer, under the names that these have in an opened model.

A file may have the experts of a block fused, or a matrix an expert and projection, gates apart from what they gate, under
names that transformers merges while it loads. Here either way has the same tensors, such as
``model.layers.0.mlp.experts.3.gate_up.weight``: planned, read and written like those of any other layer. What transformers
would merge is merged by its own operations, for one expert at a time, so that no fused parameter is whole in memory before
the experts' new tensors are stacked and written.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.headers import TensorEntry
from spmconvert.checkpoint.names import resolve_name, stacked_name
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.model.opened_module import MARK_SHAPE, OpenedModule, Part
from spmconvert.model.stored import StoredNames

Operation = Callable[[dict[str, list[Tensor]]], Tensor]


@dataclass(frozen=True)
class Piece:
    """How a tensor of an opened checkpoint follows from those of its file.

    Attributes:
        module: opened, that it belongs to, as the file's names have it.
        is_stacked: whether a converted checkpoint has it stacked with those of the other experts.
        sources: tensors of the file that it is made of, by the pattern under which they are merged.
        fused: its index on the first axis of every source, or None where it is all of the sources.
        merged: makes one entry of a fused parameter of the sources, or of that index of each, with the axis.
        transposed: whether that is the wrong way round.
    """

    module: str
    is_stacked: bool
    sources: Mapping[str, list[str]]
    fused: int | None
    merged: Operation
    transposed: bool

    def made_of(self, tensors: dict[str, list[Tensor]]) -> Tensor:
        """The tensor, of the sources."""
        (whole,) = self.merged(tensors)
        return whole.t().contiguous() if self.transposed else whole


@dataclass(frozen=True)
class OpenedCheckpoint(Checkpoint):
    """A checkpoint of an opened model.

    Attributes:
        base: the same as its files are.
        pieces: by tensor name what was not there before.
    """

    base: Checkpoint
    pieces: Mapping[str, Piece]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU in its own dtype; raises as the checkpoint itself does."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.base.read(name)
        return piece.made_of({key: [self._source(own, piece) for own in names] for key, names in piece.sources.items()})

    def _source(self, name: str, piece: Piece) -> Tensor:
        return self.base.read(name) if piece.fused is None else self.base.read_part(name, piece.fused)[None]

    def sha256(self) -> str:
        """Content hash of the files."""
        return self.base.sha256()


def opened(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """A checkpoint with the tensors that an opened model has, where it has opened modules.

    Args:
        checkpoint: as its files are.
        model: opened, on any device; only names and shapes are read.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, OpenedModule)}
    if not modules or isinstance(checkpoint, OpenedCheckpoint):
        return checkpoint
    names = StoredNames.of(model, checkpoint.tensors)
    pieces: dict[str, Piece] = {}
    for name, module in modules.items():
        found = {parameter: _sources_of(names, f"{name}.{parameter}", parts) for parameter, parts in module.by_parameter()}
        # what is not there as a whole can be left alone, and is refused where it is a target
        if None not in found.values():
            pieces |= _pieces_of(module, found)
    return _with_pieces(checkpoint, pieces)


def _pieces_of(module: OpenedModule, found: Mapping[str, Any]) -> dict[str, Piece]:
    pieces = {}
    for parameter, parts in module.by_parameter():
        prefix = found[parameter].target.removesuffix(f".{parameter}")
        for part, (sources, fused) in zip(parts, found[parameter].sources, strict=True):
            pieces[f"{prefix}.{part.name}"] = Piece(
                prefix, module.stacks and not part.idle, sources, fused, found[parameter].merged, part.transposed
            )
        if parameter == module.mark:
            # has the name of what a dense model would look for
            sources, fused = found[parameter].sources[0]
            pieces[found[parameter].target] = Piece(prefix, False, sources, fused, _mark, transposed=False)
    return pieces


def is_opened(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is no tensor of the files."""
    return isinstance(checkpoint, OpenedCheckpoint) and name in checkpoint.pieces


def stacked_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors of single experts, and what a converted checkpoint has them stacked in."""
    if not isinstance(checkpoint, OpenedCheckpoint):
        return {}
    parts = {name: name.rpartition(".") for name, piece in checkpoint.pieces.items() if piece.is_stacked}
    return {name: f"{stacked_name(layer)}.{tensor}" for name, (layer, _, tensor) in parts.items()}


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as its files are."""
    return checkpoint.base if isinstance(checkpoint, OpenedCheckpoint) else checkpoint


def restricted(checkpoint: Checkpoint, weights: Iterable[str]) -> Checkpoint:
    """A checkpoint with those of its modules opened alone that have one of these weights; others are as in its files."""
    if not isinstance(checkpoint, OpenedCheckpoint):
        return checkpoint
    pieces = checkpoint.pieces
    modules = {pieces[name].module for name in weights if name in pieces}
    return _with_pieces(checkpoint.base, {name: piece for name, piece in pieces.items() if piece.module in modules})


@dataclass(frozen=True)
class _Fused:
    """A fused parameter as a checkpoint has it: its own name there, and the sources of every part with its index."""

    target: str
    sources: list[tuple[dict[str, list[str]], int | None]]
    merged: Operation


def _sources_of(names: StoredNames, parameter: str, parts: list[Part]) -> _Fused | None:
    """Where the parts of a fused parameter are; None where they are not all there."""
    known = resolve_name(parameter, names.by_model, names.prefix)
    if known is not None:
        sources: dict[str, list[str]] = {"": [names.by_model[known]]}
        whole = parts[0].index is None
        return _Fused(
            known,
            [(sources, part.index) for part in parts],
            lambda tensors: tensors[""][0][None] if whole else tensors[""][0],
        )
    target, merging = names.merged(parameter)
    if merging is None:
        return None
    converter, by_pattern = merging
    apart = {pattern: sorted(found, key=_naturally) for pattern, found in by_pattern.items()}
    fused = all(len(found) == 1 for found in apart.values()) and len(parts) > 1
    if not fused and any(len(found) != len(parts) for found in apart.values()):
        return None

    def merged(tensors: dict[str, list[Tensor]]) -> Tensor:
        one = copy.deepcopy(converter)
        for pattern, own in tensors.items():
            for tensor in own:
                one.add_tensor(target, target, pattern, tensor)
        (whole,) = one.convert(target, config=None).values()
        # a list of one where operations leave lists
        found: Tensor = whole[0] if isinstance(whole, list) else whole
        return found

    if fused:
        return _Fused(target, [(apart, part.index) for part in parts], merged)
    by_part = [{pattern: [own[index]] for pattern, own in apart.items()} for index in range(len(parts))]
    return _Fused(target, [(sources, None) for sources in by_part], merged)


def _mark(tensors: dict[str, list[Tensor]]) -> Tensor:
    """Of the dtype of its source, for ``made_of``."""
    first = next(iter(tensors.values()))[0]
    return first.new_zeros((1, *MARK_SHAPE))


def _naturally(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their size."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _with_pieces(checkpoint: Checkpoint, pieces: Mapping[str, Piece]) -> Checkpoint:
    """The checkpoint with pieces in the place of their sources; itself where there are none."""
    if not pieces:
        return checkpoint
    replaced = {source for piece in pieces.values() for own in piece.sources.values() for source in own}
    entries: dict[str, TensorEntry] = {}
    waiting = dict(_entries(checkpoint, pieces))
    for name, entry in checkpoint.tensors.items():
        if name not in replaced:
            entries[name] = entry
            continue
        # all of them where the first one of theirs was
        entries |= waiting
        waiting = {}
    return OpenedCheckpoint(
        checkpoint.directory, checkpoint.name, checkpoint.revision, checkpoint.config, entries, checkpoint, pieces
    )


def _entries(checkpoint: Checkpoint, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, TensorEntry]]:
    shapes: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for name, piece in pieces.items():
        sources = {key: [checkpoint.tensors[own] for own in names] for key, names in piece.sources.items()}
        first = next(iter(sources.values()))[0]
        cut = [(key, tuple(_shape(entry, piece) for entry in own)) for key, own in sources.items()]
        key = (id(piece.merged), piece.transposed, *cut)
        if key not in shapes:
            shapes[key] = tuple(
                piece.made_of({key: [torch.empty(shape, device="meta") for shape in own] for key, own in cut}).shape
            )
        # no bytes of its own: they lie somewhere in the first source's file
        yield name, replace(first, name=name, shape=shapes[key], start=0, end=_nbytes(first, shapes[key]))


def _shape(entry: TensorEntry, piece: Piece) -> tuple[int, ...]:
    return entry.shape if piece.fused is None else (1, *entry.shape[1:])


def _nbytes(entry: TensorEntry, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a shape in the dtype of another one."""
    elements = max(1, torch.Size(entry.shape).numel())
    return torch.Size(shape).numel() * entry.nbytes // elements
