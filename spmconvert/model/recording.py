"""What goes into modules of a model, or comes out of them, while it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn


@contextmanager
def recorded(model: Any, names: Iterable[str], side: Literal["inputs", "outputs"]) -> Iterator[dict[str, Tensor]]:
    """The first input, or the output, of named modules in their last call, by name."""
    found: dict[str, Tensor] = {}

    def keep_for(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = output if side == "outputs" else inputs[0]

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keep_for(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
