"""Token ids for a run that only looks at shapes, times or agreement, and the first output of a model on them."""

from typing import Any

import torch

from spmconvert.errors import CheckpointError, first_line

# of a model that reads characters and has no table of them
CHARACTERS = 256


def first_output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states of a model without a head, for ids [rows, tokens]; float32.

    Raises:
        CheckpointError: when the model wants more than tokens.
    """
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    # a cache of models without attention cannot say how long it is
    keeps = {"use_cache": False} if hasattr(text_config(model.config), "use_cache") else {}
    try:
        with torch.no_grad():
            return model(**batch, **keeps)[0].float()
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{type(model).__name__} does not run on tokens alone: {first_line(error)}") from error


def runs_on_tokens(model: Any) -> bool:
    """Whether a model answers tokens alone; many say only when they are called that they want more."""
    ids = torch.arange(1, 3, device=model.device)[None] % vocabulary_size(model)
    try:
        first_output(model, ids)
    except CheckpointError:
        return False
    return True


def text_config(config: Any) -> Any:
    """What a config says of the side of the model that reads text, and of towers of the one for text."""
    two_sided = config.is_encoder_decoder
    return config.get_text_config(encoder=two_sided, decoder=not two_sided)


def vocabulary_size(model: Any) -> int:
    """Number of token ids that a model reads."""
    # an encoder and a decoder that were put together have no config of their own for text
    size = getattr(text_config(model.config), "vocab_size", None)
    if size is None:
        try:
            size = model.get_input_embeddings().num_embeddings
        except NotImplementedError:
            # no table: characters, by their hash
            size = CHARACTERS
    return int(size)


def token_batch(model: Any, tokens: int) -> dict[str, Any]:
    """Random token ids as keyword arguments: one row, or several full rows where the model's positions end."""
    positions = getattr(text_config(model.config), "max_position_embeddings", None) or tokens
    # a power of two, because some models keep a few positions for themselves
    length = min(tokens, 1 << (positions.bit_length() - 1))
    return token_rows_batch(model, -(-tokens // length), length)


def token_rows_batch(model: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Random token ids [rows, tokens] as keyword arguments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_size(model), (rows, tokens), generator=generator).to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch
