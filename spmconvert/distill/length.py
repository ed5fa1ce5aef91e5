"""How long a run is, what it trains, at what rate and in steps of how many rows, where nobody says so.

A number of steps is planned once, from the time that a step and a measurement take, since the learning rate falls to zero
at the last one; a resumed run keeps the plan. What that gives up: two machines plan different numbers, so a run that is to
be repeated names its steps.
"""

import time
from collections.abc import Callable
from typing import Literal

import torch

from spmconvert.data.training import BUCKET_STEPS, Rows, step_indices
from spmconvert.outputs.objective import Objective
from spmconvert.recipe.recipe import Training
from spmconvert.system.team import is_alone

# measurements beside those between steps: the first, and the one of what is written
MEASUREMENTS = 2
# shares of the replaced layers' parameters up to which a rate is taken; words bear higher rates than states do, and a
# model that was refined starts near its teacher, where a high rate loses what is there (docs/results.md)
RATES: dict[bool, tuple[tuple[float, float], ...]] = {
    True: ((0.15, 1e-2), (1.0, 1e-3)),
    False: ((0.15, 1e-3), (1.0, 3e-4)),
}
# of a step; of one of a language model on a CPU, where time allows few steps: 80 of 4 rows at 3e-4 got farther than
# 20 of 16 at 1e-3, and 80 of 4 at 1e-3 less far (docs/results.md)
ROWS, FEW_ROWS = 16, 4
# of the rate above, where steps have so few rows
RATE_OF_FEW_ROWS = 0.3
# parameters up to which all are trained where nobody says so: with gradients, moments and the best ones, 20 bytes each
MOST_TRAINED = 500_000_000


def settled_scope(objective: Objective, parameters: int) -> Literal["spm", "all"]:
    """What is trained: all of an encoder, since what is left of it makes up for what was replaced (docs/results.md).

    Args:
        objective: what the loss compares.
        parameters: of the model; of a large one a training state of all would be many times its size.
    """
    return "all" if objective == "hidden" and parameters <= MOST_TRAINED else "spm"


def settled_rows(objective: Objective, device: str, accumulation: int) -> int:
    """Rows of a step.

    Args:
        objective: what the loss compares.
        device: of the student.
        accumulation: parts that a step is cut into, each of a row at least.
    """
    few = objective == "logits" and torch.device(device).type == "cpu" and is_alone()
    return max(FEW_ROWS if few else ROWS, accumulation)


def settled_rate(kept: float, objective: Objective, rows: int) -> float:
    """Peak learning rate of structured layers.

    Args:
        kept: share of the replaced layers' parameters that is left.
        objective: what the loss compares.
        rows: of a step.
    """
    words = objective == "logits"
    rates = RATES[words]
    found = next((rate for most, rate in rates if kept <= most), rates[-1][1])
    return RATE_OF_FEW_ROWS * found if words and rows <= FEW_ROWS else found


def planned_steps(training: Training, step: Callable[[], float], measuring: float) -> int:
    """Steps of a run.

    Args:
        training: its numbers.
        step: gives the seconds that a step takes, the same in all processes.
        measuring: seconds that a measurement on held-out rows takes.
    """
    if training.most_minutes is None:
        return training.most_steps
    # where neither is named, steps of few rows read as much text as the others
    more = max(1, ROWS // training.rows_of_step) if training.minutes is None and training.steps is None else 1
    seconds = 60 * training.most_minutes - MEASUREMENTS * measuring
    each = step() + measuring / training.measured_every
    return min(more * training.most_steps, max(1, int(seconds / each)))


def typical_step(rows: Rows, training: Training) -> int:
    """Of the first steps the one whose number of tokens is the least far from their mean: a step has rows of one length."""
    sizes = [
        sum(rows.size(index) for index in step_indices(rows, training.rows_of_step, step, training.seed))
        for step in range(BUCKET_STEPS)
    ]
    mean = sum(sizes) / len(sizes)
    return min(range(len(sizes)), key=lambda step: abs(sizes[step] - mean))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes, with everything that it has started on a GPU."""
    _finish(device)
    began = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
