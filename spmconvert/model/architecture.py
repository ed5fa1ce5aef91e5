"""Which model class a checkpoint asks for, and its skeleton without memory."""

from typing import Any

import torch

from spmconvert.errors import NEEDS_CODE, CheckpointError, first_line


def model_class(config: Any) -> Any:
    """The transformers class that a config names first in ``architectures``.

    Raises:
        CheckpointError: when there is none, or transformers does not have it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        raise CheckpointError("config.json names no architecture; add architectures, for example ['GPT2LMHeadModel']")
    architecture = getattr(transformers, str(names[0]), None)
    # classes that would look for another, in the checkpoint's own code too, are no architectures
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        hint = NEEDS_CODE if hasattr(config, "auto_map") else "upgrade transformers"
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture {names[0]}; {hint}")
    return architecture


def load_config(directory: Any) -> Any:
    """The config of a local checkpoint.

    Raises:
        CheckpointError: when transformers does not know the model type, also where the checkpoint has code for it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"config.json in {directory} is not understood by transformers: {first_line(error)}"
        ) from None


def skeleton(config: Any, architecture: Any = None) -> Any:
    """The model on the meta device: module tree and shapes, no memory; of another class than the config names, if asked."""
    with torch.device("meta"):
        model = (architecture or model_class(config))._from_config(config)
    model.eval()
    return model
