"""What a checkpoint calls the tensors that a model calls otherwise.

transformers renames tensors while it loads, and writes the old names again when it saves: a checkpoint of
``ViTForImageClassification`` says ``vit.encoder.layer.0.intermediate.dense.weight`` where the model says
``vit.layers.0.mlp.fc1.weight``. Its own mapping is asked here, so that a module's tensors are found whatever the file
calls them, in old and new layouts. What several tensors of a file are merged into, or one is split into, has no name of its
own there, and is not found.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.names import resolve_name, shared_prefix
from spmconvert.errors import CorruptCheckpointError
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.opening import open_


@dataclass(frozen=True)
class StoredNames:
    """Names of a checkpoint's tensors by what a model calls them.

    Attributes:
        prefix: ``base_model_prefix`` of the model, which either side may have and the other not.
        by_model: the checkpoint's name by the model's.
        parts: what several tensors are merged into, by the model's name: pattern and name of each in the checkpoint.
        mapping: how transformers renames, as renamings and converters.
    """

    prefix: str
    by_model: Mapping[str, str]
    parts: Mapping[str, list[tuple[str, str]]]
    mapping: tuple[list[Any], list[Any]]

    @classmethod
    def of(cls, model: Any, tensors: Collection[str]) -> "StoredNames":
        """The names of a checkpoint.

        Args:
            model: a transformers model, on any device; only names are read.
            tensors: of the checkpoint.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        entries = get_model_conversion_mapping(model)
        renamings, converters = (
            [entry for entry in entries if isinstance(entry, kind)] for kind in (WeightRenaming, WeightConverter)
        )
        mapping = (renamings, converters)
        found: dict[str, str] = {}
        parts: dict[str, list[tuple[str, str]]] = {}
        for name in tensors:
            renamed, pattern = rename_source_key(name, *mapping)
            if pattern is None:
                found[renamed] = name
            else:
                parts.setdefault(renamed, []).append((pattern, name))
        return cls(getattr(model, "base_model_prefix", ""), found, parts, mapping)

    def tensor(self, name: str) -> str | None:
        """The checkpoint's name of a parameter, or None where it has none of its own."""
        known = resolve_name(name, self.by_model, self.prefix)
        return None if known is None else self.by_model[known]

    def parts_of(self, name: str) -> list[str]:
        """The checkpoint's tensors that are merged into a parameter; none for any other."""
        known = resolve_name(name, self.parts, self.prefix)
        return [] if known is None else [source for _, source in self.parts[known]]

    def merged(self, name: str) -> tuple[str, tuple[Any, dict[str, list[str]]] | None]:
        """How transformers makes a parameter of several tensors of the checkpoint.

        Returns:
            What the parameter would be called there, and the converter with the names of the tensors by its patterns; None
            in their place where nothing is merged into it.
        """
        known = resolve_name(name, self.parts, self.prefix)
        if known is None:
            return name, None
        by_pattern: dict[str, list[str]] = {}
        for pattern, source in self.parts[known]:
            by_pattern.setdefault(pattern, []).append(source)
        _, converters = self.mapping
        converter = next(one for one in converters if set(by_pattern) <= set(one.source_patterns))
        # in the order in which they are merged
        return known, (converter, {pattern: by_pattern[pattern] for pattern in converter.source_patterns})

    def module(self, name: str, stored: str, parts: Collection[str]) -> str | None:
        """What to call a module's new tensors so that transformers finds them, or None where no name will do.

        Args:
            name: of the module in the model.
            stored: what the checkpoint calls it, which is the first choice.
            parts: names of its tensors.
        """
        for candidate in (stored, name):
            if all(self._is_loaded_as(f"{candidate}.{part}", f"{name}.{part}") for part in parts):
                return candidate
        return None

    def _is_loaded_as(self, stored: str, name: str) -> bool:
        renamed = _renamed(stored, self.mapping)
        return renamed is not None and resolve_name(name, [renamed], self.prefix) is not None


def stored_prefixes(converted: Converted) -> dict[str, str]:
    """What a converted checkpoint calls its layers, by their names in the layer map, where experts are stacked.

    Raises:
        CorruptCheckpointError: when it has no tensors of a layer.
    """
    modules = {name.rpartition(".")[0] for name in converted.tensors}
    try:
        prefix = shared_prefix(converted.entries, modules)
    except CorruptCheckpointError:
        found = _renamed_prefixes(converted)
        if found is None:
            raise
        return found
    return {layer: str(resolve_name(layer, modules, prefix)) for layer in converted.entries}


def _renamed_prefixes(converted: Converted) -> dict[str, str] | None:
    """The same where transformers renames them; None where a layer is not there either way."""
    model = skeleton(load_config(converted.directory))
    open_(model)
    names = StoredNames.of(model, converted.tensors)
    # every layer stores a mark of that name
    marks = {layer: names.tensor(f"{layer}.weight") for layer in converted.entries}
    if None in marks.values():
        return None
    return {layer: str(mark).removesuffix(".weight") for layer, mark in marks.items()}


def _renamed(name: str, mapping: tuple[list[Any], list[Any]]) -> str | None:
    """What transformers calls a tensor of a checkpoint, or None where it merges or splits it."""
    from transformers.core_model_loading import rename_source_key

    renamed, converter = rename_source_key(name, *mapping)
    return renamed if converter is None else None
