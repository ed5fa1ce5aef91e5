"""The training loop: one function, readable from top to bottom.

What decides about the next step is in the parameters, the optimizer and the step number, so a checkpoint is those three,
and a resumed run ends with the same bytes on a CPU. Dropout is off, as it is in the teacher. The state with the
lowest held-out loss is what is kept; a loss that is not finite, or that stays above the start, ends the run there.
Losses are divided by the tokens of the whole step, over all parts and processes, so that neither changes the result.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from spmconvert.data.training import TrainingData, step_indices
from spmconvert.distill.guide import Guide
from spmconvert.distill.layerwise import match_layer
from spmconvert.distill.length import planned_steps, timed, typical_step
from spmconvert.distill.loss import Distillation, Loss
from spmconvert.distill.state import State, restore, snapshot
from spmconvert.operator.kept import Keeper
from spmconvert.recipe.recipe import Training

# a held-out loss above this multiple of the first one ends a run at once; above the first one, two measurements in a row of
# its second half do. In the first half the rate is still high, and the better the start, the farther above it runs go that
# come back: with 2.0 two of three seeds of a small GPT-2 that begins 0.008 from its teacher were ended, while the third got
# to 0.004
DIVERGED = 4.0
# of float32: a loss below this is one of rounding
SMALLEST_LOSS = 1e-6


@dataclass
class TrainingRun:
    """One training run.

    Attributes:
        distillation: student, teacher and objective.
        data: rows to train and to measure on.
        training: numbers of the run.
        accelerator: an ``accelerate.Accelerator``.
        called: what a training step calls: the student, or its distributed wrapper.
        trained: the parameters that change, by name.
        structured: names of those that belong to structured layers, which have their own learning rate.
        save: keeps a snapshot; called on all processes.
        report: told about every step, measurement and matched layer.
        guide: mixes the dense layers in, or None.
        state: where the run stands.
    """

    distillation: Distillation
    data: TrainingData
    training: Training
    accelerator: Any
    called: Any
    trained: dict[str, nn.Parameter]
    structured: frozenset[str]
    save: Callable[[dict[str, Any]], None]
    report: Callable[[dict[str, Any]], None]
    guide: Guide | None = None
    state: State = field(default_factory=State)


def train(run: TrainingRun, earlier_snapshot: dict[str, Any] | None = None) -> State:
    """Distil end to end until the steps are done.

    Args:
        run: what to train, and with what.
        earlier_snapshot: of this stage to go on from, or None.
    """
    training, state, accelerator = run.training, run.state, run.accelerator
    optimizer = accelerator.prepare(torch.optim.AdamW(parameter_groups(run.trained, run.structured, training), fused=True))
    peaks = [group["lr"] for group in optimizer.param_groups]
    if earlier_snapshot is not None:
        restore(earlier_snapshot, state, run.trained, optimizer.optimizer)
    measuring = 0.0 if state.history else timed(lambda: measure(run), accelerator.device)
    if not state.planned:
        # where layers were matched before, a measurement is there already
        measuring = measuring or timed(lambda: held_out_losses(run), accelerator.device)
        state.planned = planned_steps(training, lambda: _step_seconds(run), _longest(run, measuring))
    while state.step < state.planned and not state.stopped:
        began = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(state.step, state.planned, training.warm_up)
        if run.guide is not None:
            run.guide.set_step(state.step)
        part_losses = _differentiate(run, state.step)
        norm = _clip(run)
        if not math.isfinite(norm) and training.precision != "fp16":
            state.stopped = f"the loss or its gradient was not finite at step {state.step + 1}"
            break
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        state.update_average(run.trained, training.ema)
        sums = _sums(run, part_losses)
        state.tokens += round(sums["positions"])
        state.curve.append(sums["loss"] / sums["positions"])
        factor = rate(state.step - 1, state.planned, training.warm_up)
        run.report(_step_record(state, sums, factor, time.perf_counter() - began))
        if state.step % training.measured_every == 0 or state.step == state.planned:
            measure(run)
        if state.step % training.save_every == 0 and state.step < state.planned and not state.stopped:
            run.save(snapshot(state, run.trained, optimizer.optimizer))
    return state


def _differentiate(run: TrainingRun, step: int) -> list[Loss]:
    """Gradients of one step, in this process's parts of its rows; returns the parts' losses."""
    training, accelerator, data = run.training, run.accelerator, run.data
    rows = step_indices(data.training, training.rows_of_step, step, training.seed)
    total = _positions(run, rows)
    parts = list(_parts(rows[accelerator.process_index :: accelerator.num_processes], training.accumulation))
    part_losses: list[Loss] = []
    for index, part in enumerate(parts):
        batch = data.training.batch(part, run.distillation.student, step + 1)
        with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(run.called), accelerator.autocast():
            loss = run.distillation.loss(batch, run.called)
            share = _positions(run, part) / total
            # gradients are averaged over processes, so each counts its own share as many times as there are processes
            accelerator.backward(loss.total / loss.positions * share * accelerator.num_processes)
        part_losses.append(loss)
    return part_losses


def _step_seconds(run: TrainingRun) -> float:
    """Seconds that a step takes, by its gradients, which are let go; the first of two may still allocate and compile."""
    typical = typical_step(run.data.training, run.training)
    seconds = [timed(lambda: _differentiate(run, typical), run.accelerator.device) for _ in range(2)]
    run.called.zero_grad(set_to_none=True)
    return _longest(run, seconds[-1])


def _longest(run: TrainingRun, seconds: float) -> float:
    """The most that any process has."""
    return float(run.accelerator.gather(torch.tensor([seconds], device=run.accelerator.device)).max())


def match_layers(run: TrainingRun, names: Sequence[str]) -> None:
    """The stage before: match converted layers to their dense originals, one after the other; skips those done already."""
    if not run.state.history:
        measure(run)
    for name in names[run.state.matched :]:
        before, after = match_layer(
            run.distillation.student,
            run.distillation.teacher,
            name,
            run.data.training,
            steps=run.training.layerwise,
            learning_rate=run.training.peak_rate,
            seed=run.training.seed,
        )
        run.state.matched += 1
        run.report({"layer": name, "matched": run.state.matched, "of": len(names), "before": before, "after": after})
        if run.state.matched == len(names):
            measure(run)
        run.save(snapshot(run.state, run.trained, None))


def rate(step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rates: linear warm-up over a share of the steps, then a cosine to zero."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def parameter_groups(
    trained: dict[str, nn.Parameter], structured: frozenset[str], training: Training
) -> list[dict[str, Any]]:
    """Structured layers at their own rate and without decay; dense matrices decay, biases and norms do not.

    Stages and low rank share the rate, though entries of stages are ten times larger: five times the rate for stages gains
    little under ``--keep`` (docs/results.md).
    """
    others = [(name, parameter) for name, parameter in trained.items() if name not in structured]
    chosen = [
        ([p for name, p in trained.items() if name in structured], training.peak_rate, 0.0),
        ([p for _, p in others if p.ndim > 1], training.other_learning_rate, training.weight_decay),
        ([p for _, p in others if p.ndim <= 1], training.other_learning_rate, 0.0),
    ]
    return [{"params": ps, "lr": peak, "weight_decay": decay} for ps, peak, decay in chosen if ps]


@torch.no_grad()
def measure(run: TrainingRun) -> None:
    """Held-out loss, and perplexity where there is one; keeps the best state and notices divergence."""
    state = run.state
    with state.averaged(run.trained):
        record = {"step": state.step, "tokens": state.tokens, **held_out_losses(run)}
        state.history.append(record)
        state.offer(record["held_out_loss"], run.trained)
    run.report(record)
    first, loss_now = state.history[0]["held_out_loss"], record["held_out_loss"]
    # a student that is its teacher begins at zero, and below it by rounding
    bound = max(first, SMALLEST_LOSS)
    above = [entry["held_out_loss"] > bound for entry in state.history[-2:]]
    late = 2 * state.step > state.planned and len(above) > 1 and all(above)
    if not loss_now < DIVERGED * bound or late:
        state.stopped = f"the held-out loss rose from {first:.4g} to {loss_now:.4g} at step {state.step}"


@torch.no_grad()
def held_out_losses(run: TrainingRun) -> dict[str, float]:
    """Held-out loss a position, and the perplexities of student and teacher where there are words."""
    training, held_out, student = run.training, run.data.held_out, run.distillation.student
    # sharded parameters change without a trace that merged blocks could see
    for module in student.modules():
        if isinstance(module, Keeper):
            module.drop_cache_()
    if run.guide is not None:
        run.guide.alpha = 0.0
    size = max(1, training.rows_of_step // training.accumulation // run.accelerator.num_processes)
    part_losses = []
    rows = sorted(range(min(len(held_out), training.evaluation_rows)), key=held_out.size)
    for part, counts in _shares(rows, size, run.accelerator):
        with run.accelerator.autocast():
            loss = run.distillation.loss(held_out.batch(part, student, 0), measure=True)
        part_losses.append(
            loss if counts else Loss(loss.total * 0, 0, {name: value * 0 for name, value in loss.parts.items()})
        )
    sums = _sums(run, part_losses)
    losses = {"held_out_loss": sums["loss"] / sums["positions"]}
    for key, name in (("cross_entropy", "perplexity"), ("teacher_cross_entropy", "teacher_perplexity")):
        if sums.get("words") and key in sums:
            losses[name] = math.exp(min(sums[key] / sums["words"], 700))
    return losses


def _shares(rows: list[int], size: int, accelerator: Any) -> Iterator[tuple[list[int], bool]]:
    """Parts of the rows for this process and whether they count; sharded models need as many calls in every process."""
    step = size * accelerator.num_processes
    for first in range(0, len(rows), step):
        share = rows[first : first + step][accelerator.process_index :: accelerator.num_processes]
        yield share or [rows[first]], bool(share)


def _positions(run: TrainingRun, rows: Sequence[int]) -> int:
    """What the rows weigh: their tokens, or their number where a row is one decision."""
    of_tokens = (run.distillation.student.config.architectures or [""])[0].endswith("ForTokenClassification")
    if run.distillation.objective in ("classes", "scores") and not of_tokens:
        return len(rows)
    return sum(run.data.training.size(index) for index in rows)


def _parts(rows: list[int], count: int) -> Iterator[list[int]]:
    """Rows cut into so many parts of about the same size: sharded parameters need as many passes in every process."""
    for index in range(count):
        yield rows[index * len(rows) // count : (index + 1) * len(rows) // count]


def _clip(run: TrainingRun) -> float:
    """Clip the gradient; its norm before."""
    if any(isinstance(parameter, DTensor) for parameter in run.trained.values()):
        norm = nn.utils.clip_grad_norm_(run.trained.values(), run.training.clip)
        return float(norm.full_tensor()) if isinstance(norm, DTensor) else float(norm)
    return float(run.accelerator.clip_grad_norm_(run.trained.values(), run.training.clip))


def _sums(run: TrainingRun, losses: Sequence[Loss]) -> dict[str, float]:
    """Sums over parts and processes: the loss, its positions and its unweighted parts."""
    names = list(losses[0].parts)
    rows = [[loss.total.detach().float(), *(loss.parts[name].float() for name in names)] for loss in losses]
    sums = torch.stack([torch.stack(row) for row in rows]).sum(0)
    count = sums.new_tensor([float(sum(loss.positions for loss in losses))])
    together = run.accelerator.reduce(torch.cat([sums, count]), reduction="sum").tolist()
    return dict(zip(["loss", *names, "positions"], together, strict=True))


def _step_record(state: State, sums: dict[str, float], factor: float, seconds: float) -> dict[str, Any]:
    parts = {
        name: value / (sums["words"] if name == "cross_entropy" else sums["positions"])
        for name, value in sums.items()
        if name not in ("loss", "positions", "words")
    }
    speed = sums["positions"] / seconds
    known = {"step": state.step, "steps": state.planned, "loss": state.curve[-1]}
    return {**known, **parts, "rate": factor, "tokens_per_second": speed}
