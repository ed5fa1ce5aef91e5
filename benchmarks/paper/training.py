"""One network on one task: train it, measure it on held-out rows, and time its steps in turn with the others.

Everything but the structure is the same: Adam, the number of steps, a linear warm-up and a cosine, the batches. The state
that counts is the one with the least validation loss of ten along the way, so that no structure is judged by how far
it overfits; test rows are only measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.paper.structures import MakeModel

Batch = tuple[Tensor, Tensor]
EVALUATIONS = 10
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Task:
    """What a network learns: classes from inputs, by cross-entropy.

    Attributes:
        name: which of the experiment's tasks it is.
        build: the network at a hidden width, with one kind of linear layer.
        batch: a batch of training inputs [rows, ...] and classes [rows, ...].
        validation: held-out rows that choose the learning rate and the state.
        test: held-out rows that are only measured.
        granularity: hidden widths are multiples of it.
    """

    name: str
    build: MakeModel
    batch: Callable[[torch.Generator], Batch]
    validation: Batch
    test: Batch
    granularity: int = 1


def random_rows(rows: Batch, size: int, generator: torch.Generator) -> Batch:
    """A batch of rows drawn with replacement."""
    inputs, classes = rows
    chosen = torch.randint(len(inputs), (size,), generator=generator)
    return inputs[chosen], classes[chosen]


@dataclass(frozen=True)
class Outcome:
    """Mean cross-entropy in nats on validation and test rows, and the share of test rows that are right."""

    validation: float
    test: float
    accuracy: float


def train(model: nn.Module, task: Task, rate: float, steps: int, seed: int) -> Outcome:
    """Train the network and measure its best state."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    best: Outcome | None = None
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        update(model, optimizer, task.batch(generator))
        if (step + 1) % max(1, steps // EVALUATIONS) == 0:
            validation, _ = measure(model, task.validation)
            if best is None or validation < best.validation:
                best = Outcome(validation, *measure(model, task.test))
    assert best is not None
    return best


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of the optimizer."""
    inputs, classes = batch
    loss = cross_entropy(model(inputs).flatten(0, -2), classes.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def measure(model: nn.Module, rows: Batch) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share of predictions that are right."""
    nats = right = 0.0
    for inputs, classes in zip(*(part.split(ROWS_AT_ONCE) for part in rows), strict=True):
        logits, wanted = model(inputs).flatten(0, -2), classes.flatten()
        nats += cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(1) == wanted).sum().item()
    return nats / rows[1].numel(), right / rows[1].numel()


def step_seconds(models: dict[str, nn.Module], task: Task, repetitions: int) -> dict[str, float]:
    """Median time of a training step of every network, on the same batch, in turn."""
    batch = task.batch(torch.Generator().manual_seed(0))
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-4) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repetition in range(repetitions + 1):
        for name, model in models.items():
            began = time.perf_counter()
            update(model, optimizers[name], batch)
            # the first one allocates
            if repetition:
                times[name].append(time.perf_counter() - began)
    return {name: torch.tensor(values).median().item() for name, values in times.items()}
