"""The towers of a model that reads more than one kind of thing: which of its modules is the one for text, and so on.

A tower is the outermost module that is a model of its own and has the config that the whole one keeps under
``text_config``, ``vision_config`` or ``audio_config``. That holds for transformers' models whatever they call the modules.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

Tower = Literal["text", "vision", "audio"]
TOWERS: tuple[Tower, ...] = get_args(Tower)


def towers_of(model: nn.Module) -> dict[Tower, str]:
    """Module names by what the tower is for; nothing for a model that is none of towers."""
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    configs = {kind: found for kind in TOWERS if (found := getattr(config, f"{kind}_config", None)) is not None}
    names: dict[Tower, str] = {}
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel):
            continue
        for kind, own in configs.items():
            # the outermost comes first
            if type(module.config) is type(own):
                names.setdefault(kind, name)
    # one alone is no tower beside others
    return names if len(names) > 1 else {}


def inside(tower: str, name: str) -> bool:
    """Whether a module is part of a tower."""
    return name.startswith(f"{tower}.")


def beyond_text(model: Any, layers: Iterable[str]) -> bool:
    """Whether any of these layers is one that text alone does not run: outside of the tower for text, and no output head.

    Args:
        model: on any device; only its modules are looked at.
        layers: their names.
    """
    text = towers_of(model).get("text")
    head = model.get_output_embeddings()
    return text is not None and any(
        not inside(text, name) and (head is None or model.get_submodule(name) is not head) for name in layers
    )
