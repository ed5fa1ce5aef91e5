"""Which model class a checkpoint asks for, and its skeleton without memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spmconvert.errors import NEEDS_CODE, CalibrationError, CheckpointError, SpmconvertError, first_line


def model_class(config: Any) -> Any:
    """The transformers class that a config names first in ``architectures``.

    Raises:
        CheckpointError: when there is none, or transformers does not have it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"architectures of config.json is {names!r}; it needs a list such as ['GPT2LMHeadModel']")
    if not names:
        raise CheckpointError("config.json names no architecture; add architectures, for example ['GPT2LMHeadModel']")
    architecture = getattr(transformers, names[0], None)
    # classes that would look for another, in the checkpoint's own code too, are no architectures
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        hint = NEEDS_CODE if hasattr(config, "auto_map") else "upgrade transformers"
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture {names[0]}; {hint}")
    return architecture


@contextmanager
def understood(otherwise: str) -> Iterator[None]:
    """Name what transformers makes of a checkpoint that it fails on: it raises whatever the code of a model raises.

    Args:
        otherwise: what to say before its reason.

    Raises:
        CheckpointError: in the place of any error but those of this package and of memory that is missing.
    """
    try:
        yield
    except (SpmconvertError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{otherwise}: {first_line(error)}") from error


@contextmanager
def runs_on(model: Any, batch: Iterable[str]) -> Iterator[None]:
    """Name a model that wants more than it is given: signatures call optional what is not, such as boxes of words.

    Args:
        model: that runs inside.
        batch: names of what it is given.

    Raises:
        CalibrationError: in the place of what its code raises for arguments that are missing.
    """
    try:
        yield
    except SpmconvertError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{type(model).__name__} does not run on {', '.join(batch)} alone: {first_line(error)}; give its processor's "
            "tensors as FILE.safetensors, or convert with --calib none"
        ) from error


def load_config(directory: Any) -> Any:
    """The config of a local checkpoint.

    Raises:
        CheckpointError: when transformers does not know the model type, also where the checkpoint has code for it.
    """
    from transformers import AutoConfig

    with understood(f"config.json in {directory} is not understood by transformers"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def skeleton(config: Any, architecture: Any = None) -> Any:
    """The model on the meta device: module tree and shapes, no memory; of another class than the config names, if asked."""
    with understood("config.json describes no model that transformers can build"), torch.device("meta"):
        model = (architecture or model_class(config))._from_config(config)
    model.eval()
    return model
