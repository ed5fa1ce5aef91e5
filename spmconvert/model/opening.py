"""Opening and closing the modules of a model whose matrices are fused into parameters: experts and recurrences."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from spmconvert.checkpoint.names import resolve_name
from spmconvert.model.experts import OpenedExperts, chosen_experts, projections
from spmconvert.model.opened_module import OpenedModule
from spmconvert.model.other_experts import OpenedProjection, OpenedSharedExperts
from spmconvert.model.places import put_module
from spmconvert.model.recurrence import OpenedRecurrence

_EXPERT = re.compile(r"(.+)\.\d+\.(gate_up|gating|up|down|expert)")
# of experts that are modules in a list to begin with
_LISTED = re.compile(r"(.+\.experts)\.(?:[a-z]+_)?\d+(?:\.(.+))?")
_RECURRENCE = re.compile(r"(.+)\.l\d+(?:_reverse)?\.(?:input|recurrent|projection)")


def can_be_opened(module: nn.Module) -> bool:
    """Whether a module has fused parameters that can be opened."""
    kinds = (OpenedProjection, OpenedSharedExperts)
    return type(module) in OpenedRecurrence.kinds or bool(projections(module)) or any(kind.opens(module) for kind in kinds)


def group_of(name: str) -> str | None:
    """Experts and projection that a layer would belong to by its name; None where it has no name of an expert's layer."""
    place = _place_of(name)
    return None if place is None else ".".join(filter(None, place))


def shown_together(names: Sequence[str]) -> dict[str, list[int]]:
    """Positions of layers by what to call them where they are shown: the experts of a projection are one line."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        place = _place_of(name)
        shown = name if place is None else ".*.".join(filter(None, place))
        found.setdefault(shown, []).append(position)
    return found


def place_in_list(name: str) -> tuple[str, str] | None:
    """Experts that are modules in a list, and the projection, empty where an expert is a layer itself; None for others."""
    match = _LISTED.fullmatch(name)
    return None if match is None else (match[1], match[2] or "")


def _place_of(name: str) -> tuple[str, str] | None:
    match = _EXPERT.fullmatch(name)
    return place_in_list(name) if match is None else (match[1], match[2])


def opened_names(names: Iterable[str]) -> set[str]:
    """The modules that must be opened for layers of these names to be there; names of other layers lead to none."""
    found = (_EXPERT.fullmatch(name) or _RECURRENCE.fullmatch(name) for name in names)
    return {match[1] for match in found if match is not None}


def open_(model: nn.Module, names: Iterable[str] | None = None, *, config: Any = None) -> list[str]:
    """Open modules, in place.

    Args:
        model: or a block of one, with or without memory.
        names: of modules, with or without the base model's prefix; None for all that can be opened.
        config: of the model; None for its own.

    Returns:
        Names of the modules that were opened.
    """
    found = [name for name, module in model.named_modules() if can_be_opened(module)]
    if names is not None:
        prefix = getattr(model, "base_model_prefix", "")
        wanted = {resolve_name(name, found, prefix) for name in names}
        found = [name for name in found if name in wanted]
    for name in found:
        parent, _, child = name.rpartition(".")
        around, module = model.get_submodule(parent), model.get_submodule(name)
        put_module(around, child, _opened(module, around, config or getattr(model, "config", None)))
    return found


def _opened(module: nn.Module, around: nn.Module, config: Any) -> OpenedModule:
    if type(module) in OpenedRecurrence.kinds:
        return OpenedRecurrence(module)
    if OpenedSharedExperts.opens(module):
        return OpenedSharedExperts(module)
    kind = OpenedProjection if OpenedProjection.opens(module) else OpenedExperts
    return kind(module, chosen_experts(around, config))


def close_(model: nn.Module) -> None:
    """Fuse all opened modules again, in place; their layers have to be dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, OpenedModule):
            parent, _, child = name.rpartition(".")
            put_module(model.get_submodule(parent), child, module.closed())
