"""Which model class a checkpoint asks for, and its skeleton without memory."""

from typing import Any

import torch

from spmconvert.errors import CheckpointError


def model_class(config: Any) -> Any:
    """The transformers class that a config names first in ``architectures``.

    Raises:
        CheckpointError: when there is none, or transformers does not have it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        raise CheckpointError("config.json names no architecture; add architectures, for example ['GPT2LMHeadModel']")
    found = getattr(transformers, names[0], None)
    if found is None:
        hint = "it needs code of its own, which is never run" if hasattr(config, "auto_map") else "upgrade transformers"
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture {names[0]}; {hint}")
    return found


def load_config(directory: Any) -> Any:
    """The config of a local checkpoint.

    Raises:
        CheckpointError: when transformers does not know the model type, or it needs code of its own, which is never run.
    """
    from transformers import AutoConfig

    try:
        # without a word transformers asks on the terminal whether to run the checkpoint's code
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            first = "it needs code of its own, which is never run"
        raise CheckpointError(f"config.json in {directory} is not understood by transformers: {first}") from None


def skeleton(config: Any) -> Any:
    """The model on the meta device: module tree and shapes, no memory."""
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    model.eval()
    return model
