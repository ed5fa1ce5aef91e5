"""Loading models: a converted one as its config names it, the dense one as it is calibrated, whole or from disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spmconvert.model.architecture import load_config, model_class, skeleton


def load(model: str | Path, **options: Any) -> Any:
    """Load a converted checkpoint as the architecture that its config names; options go to ``from_pretrained``."""
    config = load_config(model)
    return model_class(config).from_pretrained(model, **options)


def load_dense_model(directory: Path, config: Any, device: str) -> Any:
    """The dense model as it is calibrated."""
    model = model_class(config).from_pretrained(directory, dtype="auto")
    # half precision products are slow on a CPU and round the statistics
    return model.float().eval() if device == "cpu" else model.to(device).eval()


@dataclass
class DenseModel:
    """The dense model of one run: loaded when it is first asked for, let go when nothing needs it any more.

    Attributes:
        directory: checkpoint directory.
        config: the model's config.
        device: where it runs.
    """

    directory: Path
    config: Any
    device: str
    _loaded: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> Any:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = load_dense_model(self.directory, self.config, self.device)
        return self._loaded

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._loaded is not None

    def release(self) -> None:
        """Let it go; it would be loaded again."""
        self._loaded = None


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Have the floating-point tensors of a model in float32 for a while; they come back as they were, bit for bit."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    before = [(tensor, tensor.data) for tensor in tensors if tensor.dtype != torch.float32]
    for tensor, half in before:
        tensor.data = half.float()
    try:
        yield
    finally:
        for tensor, half in before:
            tensor.data = half


def load_with_blocks_on_disk(directory: Path, config: Any, device: str, container: str, folder: Path) -> Any:
    """The dense model with the weights of a list of blocks in the checkpoint's files, read whenever a block runs.

    Args:
        directory: checkpoint directory.
        config: the model's config.
        device: where it runs.
        container: name of the list of blocks.
        folder: for tensors that the model stores in another form than the checkpoint.
    """
    places = _places(skeleton(config), container, device)
    dtype = "float32" if device == "cpu" else "auto"
    loaded = model_class(config).from_pretrained(directory, dtype=dtype, device_map=places, offload_folder=folder)
    return loaded.eval()


def _places(model: Any, container: str, device: str) -> dict[str, str]:
    """A device map: blocks on disk, everything beside the way to them on the device."""
    places = {f"{container}.{index}": "disk" for index in range(len(model.get_submodule(container)))}
    way = container.split(".")
    for depth, following in enumerate(way):
        parent = model.get_submodule(".".join(way[:depth]))
        for name, _ in (*parent.named_children(), *parent.named_parameters(recurse=False)):
            if name != following:
                places[".".join((*way[:depth], name))] = device
    return places
