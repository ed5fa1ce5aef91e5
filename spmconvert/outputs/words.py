"""Distributions over words, compared from the hidden states on: full logits of two models never exist together."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 8


def has_plain_head(model: Any, batch: dict[str, Any]) -> bool:
    """Whether a model's logits are its output head on its last hidden state, and it can leave them out."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    with torch.no_grad():
        states, output = states_before_head(model, model, _beginning(batch))
        logits = head(states)
    return bool(logits.shape == output.logits.shape) and torch.allclose(logits, output.logits, rtol=1e-2, atol=1e-3)


def _beginning(batch: dict[str, Any]) -> dict[str, Any]:
    """The first tokens of the first row, or all of a batch that has more than tokens: pictures belong to some of them."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    shapes = {value.shape for value in tensors.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or not any(key.endswith("input_ids") for key in tensors):
        return batch
    return {**batch, **{key: value[:1, :PROBE_TOKENS] for key, value in tensors.items()}}


def states_before_head(called: Any, owner: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
    """Hidden states that go into the output head. The model is called as a whole, so that wrappers see every parameter."""
    caught: list[Tensor] = []
    handle = owner.base_model.register_forward_hook(lambda *found: caught.append(found[-1][0]))
    try:
        output = called(**batch)
    finally:
        handle.remove()
    return caught[0], output
