"""Loading models: a converted one as its config names it, the dense one as it is calibrated, whole or from disk."""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spmconvert.errors import CheckpointError
from spmconvert.model.architecture import load_config, model_class, skeleton, understood
from spmconvert.model.chain import Chain, chain_through
from spmconvert.model.opening import open_
from spmconvert.outputs.objective import objective_for


def load(model: str | Path, **options: Any) -> Any:
    """Load a converted checkpoint as the architecture that its config names; options go to ``from_pretrained``.

    Raises:
        CheckpointError: when it lacks a tensor that the model uses.
    """
    own = options.pop("config", None)
    return load_whole(model, own or load_config(model), changed=own is not None, **options)


def load_whole(directory: str | Path, config: Any, *, changed: bool = False, **options: Any) -> Any:
    """A model of a checkpoint, with all tensors that it uses from there: transformers draws what is missing at random.

    Args:
        directory: checkpoint.
        config: that names its architecture.
        changed: whether the model is to have this config, and not that of the directory.
        **options: of ``from_pretrained``.

    Raises:
        CheckpointError: when a tensor is missing.
    """
    architecture = model_class(config)
    options |= {"config": config} if changed else {}
    with understood(f"{directory} cannot be loaded as {architecture.__name__}"):
        model, found = architecture.from_pretrained(directory, output_loading_info=True, **options)
    missing = sorted(name for name in found["missing_keys"] if not is_unused(name, config))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory} has no {missing[0]}{more}, which {architecture.__name__} would draw at random; name the "
            "architecture that was saved in config.json, or save the checkpoint again"
        )
    return model


def is_unused(name: str, config: Any) -> bool:
    """Whether a tensor has no influence on what is compared: a pooler where hidden states are."""
    return ".pooler." in f".{name}" and objective_for(config) == "hidden"


def load_dense_model(directory: Path, config: Any, device: str) -> Any:
    """The dense model as it is calibrated, with its experts opened."""
    model = load_whole(directory, config, dtype="auto")
    open_(model)
    # half precision products are slow on a CPU and round the statistics
    return model.float().eval() if device == "cpu" else model.to(device).eval()


@dataclass
class DenseModel:
    """The dense model of one run: loaded when it is first asked for, let go when nothing needs it any more.

    Attributes:
        directory: checkpoint directory.
        config: the model's config.
        device: where it runs.
        folder: where hidden states may be that are too many for memory; None keeps them there.
    """

    directory: Path
    config: Any
    device: str
    folder: Path | None = None
    _loaded: Any = field(default=None, init=False, repr=False)
    _chains: dict[str, Chain | None] = field(default_factory=dict, init=False, repr=False)

    def __call__(self) -> Any:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = load_dense_model(self.directory, self.config, self.device)
        return self._loaded

    def lent(self) -> Any:
        """The model for whoever asks alone, who lets it go; the one that is kept, where it is loaded already."""
        return load_dense_model(self.directory, self.config, self.device) if self._loaded is None else self._loaded

    def chain(self, container: str, batch_for: Callable[[Any], dict[str, Any]]) -> Chain | None:
        """A list of its blocks, each read from disk when it is asked for; made once. None where they are no chain.

        Args:
            container: name of the list.
            batch_for: keyword arguments to try it on, for the model that it is given.
        """
        if container not in self._chains:
            model = load_with_blocks_on_disk(self.directory, self.config, self.device, container)
            self._chains[container] = chain_through(model, container, batch_for(model), self.folder)
        return self._chains[container]

    @property
    def is_whole(self) -> bool:
        """Whether the whole of it is in memory."""
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


def load_with_blocks_on_disk(directory: Path, config: Any, device: str, container: str) -> Any:
    """The dense model with a list of blocks in the checkpoint's files, in the dtype there, and the rest in float32.

    Args:
        directory: checkpoint directory.
        config: the model's config.
        device: where it runs.
        container: name of the list of blocks.
    """
    places = _places(skeleton(config), container, device)
    # for tensors that the model has in another form than the checkpoint
    folder = tempfile.TemporaryDirectory(prefix="spmconvert-", ignore_cleanup_errors=True)
    try:
        loaded = load_whole(directory, config, dtype="auto", device_map=places, offload_folder=folder.name)
    except BaseException:
        folder.cleanup()
        raise
    # as long as the model, which reads them there
    weakref.finalize(loaded, folder.cleanup)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.data = tensor.data.float()
    return loaded.eval().requires_grad_(False)


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
