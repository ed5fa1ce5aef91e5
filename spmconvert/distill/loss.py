"""What a student is asked to match: the teacher's distribution over words, its classes, its scores, or its hidden states.

The objective follows from the architecture: KL on logits for causal, masked and encoder-decoder models and for classifiers,
squared distance for a classifier of one output (a regression, a reranker), whose one class has no distribution, and hidden
states for encoders without a head. Words are compared in chunks of tokens from the hidden states on. That needs a
head which is a plain linear layer on the last hidden state; whether the model is of that kind is checked against its own
logits, and where it is not (soft caps, scaled logits, heads with layers of their own) chunks start from full logits.
Hidden states of all layers, pooled states and the outputs of the converted layers can be matched beside any of these.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spmconvert.distill.stored import StoredLogits
from spmconvert.errors import OptionError
from spmconvert.model.recording import recorded
from spmconvert.outputs.losses import class_loss, hidden_state_loss, relative_square
from spmconvert.outputs.objective import (
    Objective,
    all_states,
    class_logits,
    first_states,
    next_tokens,
    pooled,
    real_positions,
)
from spmconvert.outputs.words import compare_words, has_plain_head, word_head, word_states
from spmconvert.recipe.recipe import Training


@dataclass
class Loss:
    """A loss over some positions: tokens, rows of a classifier, or patches.

    Attributes:
        total: what is trained, summed over the positions.
        positions: how many.
        parts: sums of the unweighted parts; ``cross_entropy`` and ``teacher_cross_entropy`` over ``words`` labelled tokens.
    """

    total: Tensor
    positions: int
    parts: dict[str, Tensor]


@dataclass
class Distillation:
    """The loss of a student against its teacher on a batch.

    Attributes:
        student: the converted model.
        teacher: the dense model, in eval and without gradients; None where its logits are stored.
        objective: what is matched.
        training: weights of the parts and temperature.
        layers: converted layers, by the same name in both models.
        stored: the teacher's stored logits, in place of the teacher.
        plain_head: whether logits are a plain head on the hidden states; None until the first batch has been seen.

    Raises:
        OptionError: when stored logits are to do what only a teacher can.
    """

    student: Any
    teacher: Any | None
    objective: Objective
    training: Training
    layers: tuple[str, ...] = ()
    stored: StoredLogits | None = None
    plain_head: bool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuse what stored logits cannot do."""
        if self.stored is None:
            return
        training = self.training
        needed = [key for key in ("hidden_states", "layer_outputs", "guided", "layerwise") if getattr(training, key)]
        needed += ["temperature other than 1"] if training.temperature != 1 else []
        needed += [f"objective {self.objective}"] if self.objective != "logits" else []
        if needed:
            raise OptionError(
                f"stored logits do not replace the teacher for {', '.join(needed)}; leave --teacher-logits out"
            )

    def loss(self, batch: dict[str, Any], model: Any | None = None, *, measure: bool = False) -> Loss:
        """The loss on a batch.

        Args:
            batch: keyword arguments of the models; ``labels`` are kept from them.
            model: what to call in place of the student, a distributed wrapper of it for example.
            measure: add the cross-entropies to the parts.
        """
        labels = batch.get("labels")
        batch = {key: value for key, value in batch.items() if key != "labels"}
        if self.objective == "logits" and self.plain_head is None:
            self.plain_head = has_plain_head(self.student, batch)
        with ExitStack() as stack:
            student_outputs = stack.enter_context(recorded(self.student, self._watched, "outputs"))
            target_outputs = stack.enter_context(recorded(self.teacher, self._watched, "outputs"))
            student_run = self._run(model if model is not None else self.student, self.student, batch)
            target = None if self.teacher is None else self._run_teacher(batch)
        if self.objective == "logits":
            loss = self._words(student_run, target, batch, labels, measure=measure)
        elif self.objective in ("classes", "scores"):
            loss = self._classes(student_run, target, batch)
        else:
            loss = self._hidden(student_run[0], _required(target)[0].to(student_run[0].device), batch)
        if self.training.hidden_states:
            pairs = zip(all_states(student_run[1]), all_states(_required(target)[1]), strict=True)
            distances = [
                hidden_state_loss(real_positions(a, batch), real_positions(b.to(a.device), batch)) for a, b in pairs
            ]
            _add(loss, "hidden_states", self.training.hidden_states, torch.stack(distances).mean())
        if self.training.layer_outputs:
            device = student_run[0].device
            distances = [relative_square(student_outputs[name], target_outputs[name].to(device)) for name in self._watched]
            _add(loss, "layer_outputs", self.training.layer_outputs, torch.stack(distances).mean() * loss.positions)
        return loss

    @property
    def _watched(self) -> tuple[str, ...]:
        return self.layers if self.training.layer_outputs else ()

    def _run(self, called: Any, owner: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """States to compare (before a plain head, logits or last hidden states), and the whole output."""
        batch = {**batch, "output_hidden_states": True} if self.training.hidden_states else batch
        if self.objective == "logits":
            return word_states(called, owner, batch, plain_head=bool(self.plain_head))
        output = called(**batch)
        return first_states(output), output

    @torch.no_grad()
    def _run_teacher(self, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        device = self.teacher.device  # type: ignore[union-attr]
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        return self._run(self.teacher, self.teacher, moved)

    def _words(
        self,
        student_run: tuple[Tensor, Any],
        target: tuple[Tensor, Any] | None,
        batch: dict[str, Any],
        labels: Tensor | None,
        *,
        measure: bool,
    ) -> Loss:
        states = real_positions(student_run[0], batch)
        words = real_positions(next_tokens(batch, student_run[0]) if labels is None else labels, batch)
        targets = (real_positions(_required(target)[0], batch),) if self.stored is None else self.stored.lookup(batch)
        wants_words = measure or self.training.cross_entropy > 0
        plain_head = bool(self.plain_head)
        divergence, entropy, teacher_entropy = compare_words(
            states,
            word_head(self.student, plain_head=plain_head),
            targets,
            None if self.stored is not None else word_head(self.teacher, plain_head=plain_head),
            words if wants_words else None,
            temperature=self.training.temperature,
        )
        loss = _single("kl", divergence, len(states))
        if wants_words:
            count = (words != -100).sum()
            weight = self.training.cross_entropy * len(states) / count.clamp_min(1)
            _add(loss, "cross_entropy", weight, entropy)
            loss.parts["words"] = count
        if measure and self.stored is None:
            loss.parts["teacher_cross_entropy"] = teacher_entropy.detach()
        return loss

    def _hidden(self, student_states: Tensor, target: Tensor, batch: dict[str, Any]) -> Loss:
        states = real_positions(student_states, batch)
        loss = _single("hidden", hidden_state_loss(states, real_positions(target, batch)), len(states))
        if self.training.pooled_states:
            mean = hidden_state_loss(pooled(student_states, batch), pooled(target, batch)) / len(student_states)
            _add(loss, "pooled_states", self.training.pooled_states, mean * loss.positions)
        return loss

    def _classes(self, student_run: tuple[Tensor, Any], target: tuple[Tensor, Any] | None, batch: dict[str, Any]) -> Loss:
        logits, target_logits = (class_logits(run[1], batch) for run in (student_run, _required(target)))
        target_logits = target_logits.to(logits.device)
        scores = self.objective == "scores"
        total = class_loss(logits, target_logits, scores=scores, temperature=self.training.temperature)
        return _single("square" if scores else "kl", total, len(logits))


def _required(target: tuple[Tensor, Any] | None) -> tuple[Tensor, Any]:
    if target is None:
        raise OptionError("this objective needs the teacher itself; leave --teacher-logits out")
    return target


def _single(name: str, total: Tensor, positions: int) -> Loss:
    return Loss(total, positions, {name: total.detach()})


def _add(loss: Loss, name: str, weight: float | Tensor, value: Tensor) -> None:
    loss.parts[name] = value.detach()
    loss.total = loss.total + weight * value
