"""The training loop: one function, readable from top to bottom.

What decides about the next step is in the parameters, the optimizer and the step number, so a checkpoint is those three,
and a resumed run ends with the same bytes on a CPU. Dropout is off, as it is in the teacher. The state with the
lowest held-out loss is what is kept; a loss that is not finite, or that rises above the start for good, ends the run there.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.distill.data import TrainingText, batch_indices
from spmconvert.distill.losses import Distillation
from spmconvert.operator.linear import SPMLinear
from spmconvert.text import padded_batch

# held-out loss above this multiple of the first one counts as diverged
DIVERGED = 2.0


@dataclass(frozen=True)
class Schedule:
    """Numbers of a training run.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step, over all processes.
        accumulation: parts a step's rows are cut into, one forward and backward each.
        learning_rate: of the SPM layers, at its peak.
        other_learning_rate: of everything else that is trained.
        weight_decay: of dense weights; SPM layers have none.
        warm_up: share of the steps in which the rate rises.
        clip: largest norm of the gradient.
        evaluate_every: steps between measurements on held-out rows.
        save_every: steps between checkpoints.
        evaluation_rows: most held-out rows a measurement uses.
        seed: seed of the order of rows.
    """

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    other_learning_rate: float
    weight_decay: float
    warm_up: float
    clip: float
    evaluate_every: int
    save_every: int
    evaluation_rows: int
    seed: int

    def rate(self, step: int) -> float:
        """Factor of the learning rates: linear warm-up, then a cosine to zero."""
        rising = max(1, round(self.warm_up * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


@dataclass
class State:
    """Where a run stands; what a checkpoint holds.

    Attributes:
        step: steps done.
        tokens: tokens trained on.
        history: one record a measurement.
        best_loss: lowest held-out loss.
        best: trained parameters at that point.
        stopped: why the run ended early, or an empty string.
    """

    step: int = 0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    stopped: str = ""


def train(
    distillation: Distillation,
    text: TrainingText,
    schedule: Schedule,
    accelerator: Any,
    *,
    trained: dict[str, nn.Parameter],
    restored: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    report: Callable[[dict[str, Any]], None],
) -> State:
    """Distil until the steps are done.

    Args:
        distillation: student, teacher and objective.
        text: rows to train and to measure on.
        schedule: numbers of the run.
        accelerator: an ``accelerate.Accelerator``.
        trained: the parameters that change, by name.
        restored: what ``save`` was last given, to go on from there.
        save: keeps a checkpoint.
        report: told about every step and measurement.
    """
    student = accelerator.prepare(distillation.student)
    optimizer = accelerator.prepare(torch.optim.AdamW(_groups(distillation.student, trained, schedule)))
    peaks = [group["lr"] for group in optimizer.param_groups]
    state = State()
    if restored is not None:
        _restore(restored, state, trained, optimizer)
    else:
        _measure(distillation, text, schedule, state, trained, report)
    while state.step < schedule.steps and not state.stopped:
        began = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.rate(state.step)
        rows = batch_indices(len(text.training), schedule.batch_size, state.step, schedule.seed)
        own = rows[accelerator.process_index :: accelerator.num_processes]
        loss_sum, count = 0.0, 0
        for part in _parts(own, schedule.accumulation):
            batch = padded_batch([text.training[i] for i in part], text.padding, distillation.student)
            loss, tokens = distillation.loss(batch, student if accelerator.num_processes > 1 else None)
            # rows have equal lengths or nearly so; the mean over parts is the mean over tokens
            accelerator.backward(loss / tokens * len(part) / len(own))
            loss_sum, count = loss_sum + loss.item(), count + tokens
        norm = accelerator.clip_grad_norm_(trained.values(), schedule.clip)
        if not math.isfinite(loss_sum) or not math.isfinite(float(norm)):
            state.stopped = f"the loss or its gradient was not finite at step {state.step + 1}"
            break
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        state.tokens += count * accelerator.num_processes
        speed = count * accelerator.num_processes / (time.perf_counter() - began)
        report({"step": state.step, "loss": loss_sum / count, "rate": schedule.rate(state.step - 1), "tokens/s": speed})
        if state.step % schedule.evaluate_every == 0 or state.step == schedule.steps:
            _measure(distillation, text, schedule, state, trained, report)
        if state.step % schedule.save_every == 0 and state.step < schedule.steps and accelerator.is_main_process:
            save(_snapshot(state, trained, optimizer))
    return state


def _groups(student: nn.Module, trained: dict[str, nn.Parameter], schedule: Schedule) -> list[dict[str, Any]]:
    """SPM layers at their own rate and without decay; dense matrices decay, biases and norms do not."""
    spm = {id(p) for module in student.modules() if isinstance(module, SPMLinear) for p in module.parameters()}
    structured = [p for p in trained.values() if id(p) in spm]
    matrices = [p for p in trained.values() if id(p) not in spm and p.ndim > 1]
    vectors = [p for p in trained.values() if id(p) not in spm and p.ndim <= 1]
    groups = [
        {"params": structured, "lr": schedule.learning_rate, "weight_decay": 0.0},
        {"params": matrices, "lr": schedule.other_learning_rate, "weight_decay": schedule.weight_decay},
        {"params": vectors, "lr": schedule.other_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _parts(rows: list[int], count: int) -> Iterator[list[int]]:
    size = -(-len(rows) // count)
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


@torch.no_grad()
def _measure(
    distillation: Distillation,
    text: TrainingText,
    schedule: Schedule,
    state: State,
    trained: dict[str, nn.Parameter],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Held-out loss a token; keeps the best state and notices divergence."""
    total, count = 0.0, 0
    size = max(1, schedule.batch_size // schedule.accumulation)
    rows = range(min(len(text.held_out), schedule.evaluation_rows))
    for first in range(0, len(rows), size):
        batch = padded_batch([text.held_out[i] for i in rows[first : first + size]], text.padding, distillation.student)
        loss, tokens = distillation.loss(batch)
        total, count = total + loss.item(), count + tokens
    record = {"step": state.step, "tokens": state.tokens, "held_out_loss": total / count, "held_out_tokens": count}
    state.history.append(record)
    report(record)
    if record["held_out_loss"] < state.best_loss:
        state.best_loss = record["held_out_loss"]
        state.best = {name: p.detach().clone() for name, p in trained.items()}
    if not record["held_out_loss"] < DIVERGED * state.history[0]["held_out_loss"]:
        state.stopped = f"the held-out loss rose to {record['held_out_loss']:.4g} at step {state.step}"


def _snapshot(state: State, trained: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Any]:
    parameters = {name: p.detach() for name, p in trained.items()}
    return {"state": vars(state), "parameters": parameters, "optimizer": optimizer.state_dict()}


def _restore(restored: dict[str, Any], state: State, trained: dict[str, nn.Parameter], optimizer: Any) -> None:
    vars(state).update(restored["state"])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(restored["parameters"][name])
    optimizer.load_state_dict(restored["optimizer"])
