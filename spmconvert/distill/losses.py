"""What a student is asked to match: the teacher's distribution over words, its classes, or its hidden states.

The objective follows from the architecture: KL on logits for causal, masked and encoder-decoder models and for classifiers,
hidden states for encoders without a head. KL over a vocabulary is computed in chunks of tokens, from the hidden states
through the output head, and the chunk is computed again in the backward pass, so that full logits of student and teacher
never exist. That needs a head which is a plain linear layer on the last hidden state; whether the model is of that kind is
checked against its own logits, and where it is not (soft caps, scaled logits) the model's full logits are used.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

Objective = Literal["logits", "classes", "hidden"]
CHUNK_TOKENS = 256


def objective_for(config: Any) -> Objective:
    """What is matched for an architecture."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        return "logits"
    return "classes" if "Classification" in name or name.endswith("ForQuestionAnswering") else "hidden"


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of KL(teacher || student) times temperature², in float32.

    Args:
        student: logits [tokens, classes].
        teacher: logits [tokens, classes].
        temperature: both are divided by it first (Hinton, Vinyals, Dean 2015).
    """
    log_student = log_softmax(student.float() / temperature, dim=-1)
    log_teacher = log_softmax(teacher.float() / temperature, dim=-1)
    return kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2


def chunked_kl(
    student: tuple[Tensor, torch.nn.Module], teacher: tuple[Tensor, torch.nn.Module], temperature: float
) -> Tensor:
    """The same from hidden states [tokens, features] and output heads, a chunk of tokens at a time."""

    def chunk_loss(own: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target_logits = teacher[1](target)
        return kl_divergence(student[1](own), target_logits.to(own.device), temperature)

    total = student[0].new_zeros((), dtype=torch.float32)
    for own, target in zip(student[0].split(CHUNK_TOKENS), teacher[0].split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(chunk_loss, own, target, use_reentrant=False)
    return total


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of (1 - cosine) + squared error relative to the teacher's mean square; states [tokens, features]."""
    student, teacher = student.float(), teacher.float()
    cosine = 1 - cosine_similarity(student, teacher, dim=-1)
    square = (student - teacher).square().mean(-1) / teacher.square().mean().clamp_min(1e-12)
    return (cosine + square).sum()


@dataclass
class Distillation:
    """The loss of a student against its teacher on a batch.

    Attributes:
        student: the converted model.
        teacher: the dense model, in eval and without gradients.
        objective: what is matched.
        temperature: of the distributions.
        headless: whether logits are a plain head on the hidden states; None until the first batch has been seen.
    """

    student: Any
    teacher: Any
    objective: Objective
    temperature: float = 1.0
    headless: bool | None = None

    def loss(self, batch: dict[str, Any], model: Any | None = None) -> tuple[Tensor, int]:
        """Sum of the loss over the tokens (or rows, for classes) that count, and their number.

        Args:
            batch: keyword arguments of the models.
            model: what to call in place of the student, a distributed wrapper of it for example.
        """
        student = model if model is not None else self.student
        moved = {key: value.to(self.teacher.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if self.objective == "classes":
            own, target = student(**batch).logits, self._target(moved).logits.to(self.student.device)
            own, target = own.flatten(0, -2), target.flatten(0, -2)
            return kl_divergence(own, target, self.temperature), len(own)
        mask = batch["attention_mask"].bool()
        if self.objective == "hidden":
            own, target = student(**batch)[0][mask], self._target(moved)[0].to(self.student.device)[mask]
            return hidden_state_loss(own, target), len(own)
        if self.headless is None:
            self.headless = self._has_plain_head(moved)
        if not self.headless:
            own, target = student(**batch).logits[mask], self._target(moved).logits.to(self.student.device)[mask]
            return kl_divergence(own, target, self.temperature), len(own)
        return self._from_hidden_states(student, batch, moved, mask)

    def _from_hidden_states(
        self, student: Any, batch: dict[str, Any], moved: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, int]:
        own = _last_hidden(student, self.student, batch)[mask]
        with torch.no_grad():
            target = _last_hidden(self.teacher, self.teacher, moved)[mask.to(self.teacher.device)]
        heads = self.student.get_output_embeddings(), self.teacher.get_output_embeddings()
        return chunked_kl((own, heads[0]), (target, heads[1]), self.temperature), len(own)

    def _target(self, batch: dict[str, Any]) -> Any:
        with torch.no_grad():
            return self.teacher(**batch)

    def _has_plain_head(self, batch: dict[str, Any]) -> bool:
        """Whether the teacher's logits are its output head on its last hidden state."""
        head = self.teacher.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or self.teacher.config.is_encoder_decoder:
            return False
        probe = {key: value[:1, :8] if isinstance(value, Tensor) else value for key, value in batch.items()}
        with torch.no_grad():
            logits = self.teacher(**probe).logits
            from_hidden = head(_last_hidden(self.teacher, self.teacher, probe))
        return from_hidden.shape == logits.shape and torch.allclose(from_hidden, logits, rtol=1e-2, atol=1e-3)


def _last_hidden(called: Any, owner: Any, batch: dict[str, Any]) -> Tensor:
    """Hidden states that go into the output head; a wrapper is called as a whole so that it sees every parameter."""
    if called is owner:
        states: Tensor = owner.base_model(**batch)[0]
        return states
    caught: list[Tensor] = []
    handle = owner.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        called(**batch, logits_to_keep=1)
    finally:
        handle.remove()
    return caught[0]
