"""Losses between a student and its teacher, as plain functions of tensors.

All are sums over tokens in float32, so that parts of a batch add up whatever their sizes. Losses over a vocabulary are
computed by ``over_chunks``, from hidden states through the output head, a few tokens at a time and again in the backward
pass: full logits of student and teacher never exist together. Its price is one more product with each head, a fifth of a
step of few tokens on a CPU, where all is kept instead; what it saves is measured by ``benchmarks/distillation_memory.py``.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, mse_loss
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
# a probability below this counts as none
SMALLEST = 1e-9


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of KL(teacher || student) times temperature², in float32.

    Args:
        student: logits [tokens, classes].
        teacher: logits [tokens, classes].
        temperature: both are divided by it first (Hinton, Vinyals, Dean 2015).
    """
    log_student, log_teacher = (log_softmax(_cooled(logits, temperature), dim=-1) for logits in (student, teacher))
    return kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    # a pass over a vocabulary that changes nothing takes as long as one that does
    return logits.float() if temperature == 1 else logits.float() / temperature


def sparse_kl_divergence(student: Tensor, words: Tensor, log_probabilities: Tensor) -> Tensor:
    """The same at temperature 1 where only the teacher's likeliest words are known; all others count as one word.

    Args:
        student: logits [tokens, classes].
        words: likeliest words [tokens, k] (int64).
        log_probabilities: theirs [tokens, k].
    """
    log_student = log_softmax(student.float(), dim=-1).gather(-1, words)
    log_teacher = log_probabilities.float()
    known = (log_teacher.exp() * (log_teacher - log_student)).sum()
    rest_teacher = (1 - log_teacher.exp().sum(-1)).clamp_min(SMALLEST)
    rest_student = (1 - log_student.exp().sum(-1)).clamp_min(SMALLEST)
    return known + (rest_teacher * (rest_teacher.log() - rest_student.log())).sum()


def class_loss(student: Tensor, teacher: Tensor, *, scores: bool, temperature: float = 1.0) -> Tensor:
    """Sum over rows of the divergence of their classes, or of the squared distance of their scores, in float32.

    Args:
        student: logits [rows, classes].
        teacher: logits [rows, classes].
        scores: whether the one class is a score, which has no distribution.
        temperature: that both distributions are taken at.
    """
    if scores:
        return mse_loss(student.float(), teacher.float(), reduction="sum")
    return kl_divergence(student, teacher, temperature)


def over_chunks(loss: Callable[..., Tensor], *states: Tensor, kept: bool = False) -> Tensor:
    """Sum of a loss over chunks of tokens.

    Args:
        loss: from one chunk of every tensor to a tensor of sums.
        states: tensors [tokens, ...].
        kept: keep what the backward pass needs of every chunk, where each is computed again in it otherwise.
    """
    run = loss if kept else partial(checkpoint, loss, use_reentrant=False)
    return torch.stack([run(*piece) for piece in zip(*(state.split(CHUNK_TOKENS) for state in states), strict=True)]).sum(0)


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of (1 - cosine) + squared error relative to the teacher's mean square; states [tokens, features]."""
    student, teacher = student.float(), teacher.float()
    cosine = 1 - cosine_similarity(student, teacher, dim=-1)
    return cosine.sum() + relative_square(student, teacher) * len(student)


def relative_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error relative to the teacher's mean square, in float32."""
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)
