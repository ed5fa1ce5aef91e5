"""What of a model's output is compared: words, classes, scores or hidden states, and at which positions."""

from typing import Any, Literal

import torch
from torch import Tensor

Objective = Literal["logits", "classes", "scores", "hidden"]


def objective_for(config: Any, architecture: str | None = None) -> Objective:
    """What is matched for a model's config, or for another class that was loaded from the same checkpoint."""
    name = architecture or (getattr(config, "architectures", None) or [""])[0]
    scores = "Classification" in name and getattr(config, "num_labels", None) == 1
    return "scores" if scores else objective_of(name)


def objective_of(name: str) -> Objective:
    """What is matched for an architecture, whatever the number of its classes."""
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        return "logits"
    return "classes" if "Classification" in name or name.endswith("ForQuestionAnswering") else "hidden"


def next_tokens(batch: dict[str, Any], states: Tensor) -> Tensor:
    """The token after every token, -100 where there is none: [rows, tokens]."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None:
        return torch.full(states.shape[:2], -100, device=states.device)
    mask = real_mask(batch, states)
    real = ids if mask is None else ids.where(mask, -100)
    return torch.cat([real[:, 1:], torch.full_like(real[:, :1], -100)], dim=1)


def real_mask(batch: dict[str, Any], states: Tensor) -> Tensor | None:
    """Positions that are no padding [rows, tokens], where the batch says so."""
    for key in ("decoder_attention_mask", "attention_mask"):
        mask = batch.get(key)
        if mask is not None and mask.shape == states.shape[:2]:
            real: Tensor = mask.bool().to(states.device)
            return real
    return None


def real_positions(states: Tensor, batch: dict[str, Any]) -> Tensor:
    """States of the positions that are no padding, [positions, ...]."""
    mask = real_mask(batch, states)
    return states.flatten(0, 1) if mask is None else states[mask]


def pooled(states: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mean state of every row over its real positions, [rows, features]."""
    mask = real_mask(batch, states)
    weights = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def class_logits(output: Any, batch: dict[str, Any]) -> Tensor:
    """Logits [positions, classes]; for answers in a text, the tokens of every row, for start and end."""
    if "start_logits" in output:
        both = torch.cat([output.start_logits, output.end_logits])
        mask = real_mask(batch, output.start_logits)
        return both if mask is None else both.masked_fill(~mask.repeat(2, 1), torch.finfo(both.dtype).min)
    logits: Tensor = output.logits
    return real_positions(logits, batch) if logits.ndim > 2 else logits


def first_states(output: Any) -> Tensor:
    """The first of a model's outputs that is no number of something, such as the codes of a sound.

    Of towers side by side the embeddings of both [rows, 2, features]: what they agree on is compared elsewhere.
    """
    both = paired_embeddings(output)
    if both is not None:
        return both
    values = output.values() if isinstance(output, dict) else output
    found: Tensor = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    return found


def paired_embeddings(output: Any) -> Tensor | None:
    """What towers side by side make of a text and of a picture, [rows, 2, features]; None for any other output."""
    if not isinstance(output, dict):
        return None
    sides = [output.get(f"{side}_embeds") for side in ("text", "image")]
    tensors = [side for side in sides if isinstance(side, Tensor) and side.ndim == 2]
    alike = len(tensors) == len(sides) and tensors[0].shape == tensors[1].shape
    return torch.stack(tensors, dim=1) if alike else None


def all_states(output: Any) -> tuple[Tensor, ...]:
    """All hidden states of a model's output, those of a decoder after those of its encoder."""
    names = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    return tuple(state for name in names for state in (getattr(output, name, None) or ()))
