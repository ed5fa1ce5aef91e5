"""Distributions over words, compared from the hidden states on: full logits of two models never exist together."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spmconvert.outputs.losses import kl_divergence, over_chunks, sparse_kl_divergence

PROBE_TOKENS = 8
# of so few all that the backward pass needs is kept, 0.4 GB
KEPT_LOGITS = 2**25


def has_plain_head(model: Any, batch: dict[str, Any]) -> bool:
    """Whether a model's logits are its output head on its last hidden state, and it can leave them out."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    # a class without a name for what is before its head
    if model.base_model is model:
        return False
    with torch.no_grad():
        caught, output = _watched(model, model, _beginning(batch))
        if not caught:
            # OPT calls what is inside of its base model
            return False
        logits = head(caught[0])
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
    caught, output = _watched(called, owner, batch)
    return caught[0], output


def _watched(called: Any, owner: Any, batch: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """The states that the base model gave, for every time that it was called, and the whole output."""
    caught: list[Tensor] = []
    handle = owner.base_model.register_forward_hook(lambda *arguments: caught.append(arguments[-1][0]))
    try:
        output = called(**batch)
    finally:
        handle.remove()
    return caught, output


def word_states(called: Any, owner: Any, batch: dict[str, Any], *, plain_head: bool) -> tuple[Tensor, Any]:
    """What a model's words follow from: the states before a plain head, or the logits; and its whole output.

    Args:
        called: the model, or a distributed wrapper of it.
        owner: the model itself.
        batch: its keyword arguments.
        plain_head: whether ``has_plain_head`` holds.
    """
    if plain_head:
        return states_before_head(called, owner, {**batch, "logits_to_keep": 1})
    output = called(**batch)
    return output.logits, output


def word_head(model: Any, *, plain_head: bool) -> Callable[[Tensor], Tensor]:
    """From what ``word_states`` gives to logits."""
    head: Callable[[Tensor], Tensor] = model.get_output_embeddings() if plain_head else nn.Identity()
    return head


def compare_words(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: tuple[Tensor, ...],
    target_head: Callable[[Tensor], Tensor] | None,
    answers: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """How far a student's words are from a teacher's, in chunks of tokens.

    Args:
        states: of the student, [tokens, features].
        head: from them to logits.
        targets: the teacher's states [tokens, features]; or, without ``target_head``, its likeliest words
            [tokens, k] (int64) and their log-probabilities [tokens, k].
        target_head: from the teacher's states to its logits.
        answers: the text's own tokens [tokens] (int64), -100 where there is none; None where nobody asks for entropies.
        temperature: that both distributions are taken at.

    Returns:
        Sums over the tokens, float32 [3]: the divergence KL(teacher || student), the cross-entropy of the student with the
        answers and that of the teacher; zero where it is not asked for or not known.
    """

    def chunk(student_states: Tensor, *others: Tensor) -> Tensor:
        logits = head(student_states)
        zero = logits.new_zeros((), dtype=torch.float32)
        given = others[: len(targets)]
        teacher_entropy = zero
        if target_head is None:
            divergence = sparse_kl_divergence(logits, *given)
        else:
            with torch.no_grad():
                teacher_logits = target_head(given[0]).to(logits.device)
            divergence = kl_divergence(logits, teacher_logits, temperature)
            if answers is not None:
                teacher_entropy = _cross_entropy(teacher_logits, others[-1])
        entropy = zero if answers is None else _cross_entropy(logits, others[-1])
        return torch.stack([divergence, entropy, teacher_entropy])

    vocabulary = head.out_features if isinstance(head, nn.Linear) else states.shape[-1]
    kept = len(states) * vocabulary <= KEPT_LOGITS
    return over_chunks(chunk, states, *targets, *(() if answers is None else (answers,)), kept=kept)


def _cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    return cross_entropy(logits.float(), answers, ignore_index=-100, reduction="sum")
