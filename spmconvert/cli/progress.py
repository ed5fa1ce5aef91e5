"""Live lines about long work on standard error, and lines in a log where no bar can be drawn."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from spmconvert.units import count, size

if TYPE_CHECKING:
    from spmconvert.data.standin import StandIn
    from spmconvert.fit.layer import LayerRecord
    from spmconvert.plan.plan import ConversionPlan
    from spmconvert.recipe.recipe import Budget, Recipe
from spmconvert.cli.console import err, note
from spmconvert.cli.views import _layers

# between two lines about progress in a log
LOG_SECONDS = 30.0


def _live_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=err,
        transient=True,
        # it would leave an empty line
        disable=not err.is_terminal,
    )


class _Log:
    """A line now and then about how far work is, where no bar can be drawn: in a pipe or a file."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, what: str, done: int, total: int) -> None:
        """Say it, unless there is a bar or the last line was a moment ago."""
        if not err.is_terminal and time.monotonic() - self._last >= LOG_SECONDS:
            self._last = time.monotonic()
            note(f"{what}: {done} of {total}")


class ConversionProgress:
    """A live line while layers are calibrated and fitted; the ``Progress`` that ``convert`` talks to."""

    def __init__(self) -> None:
        self._progress, self._log = _live_bar(), _Log()
        self._calibration = self._progress.add_task("calibrating", total=None, visible=False)
        self._layers = self._progress.add_task("fitting", total=None, visible=False)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing."""
        self._progress.stop()

    def reading(self, recipe: "Recipe", standing_in: "StandIn | None") -> None:
        """Say what stands in for a calibration text, and what that costs."""
        if standing_in is not None:
            note(f"calibrated on {standing_in.what}; {standing_in.better}, --calib")
        elif recipe.calibration.file is None:
            note("no calibration data: layers are fitted in the Frobenius norm, which is far worse; give --calib")

    def reading_few(self, tokens: int, width: int) -> None:
        """Say what errors that are measured on them are worth."""
        note(
            f"warning: the calibration text gives {tokens:,} tokens to fit, fewer than the {width:,} inputs of a layer; so "
            "few say next to nothing about it, nor do their errors; give a longer text"
        )

    def taking(self, budget: "Budget") -> None:
        """Say which."""
        slower = " --allow-slower, for its size alone" if budget.allow_slower else ""
        note(f"no design and no budget is named: {budget.option}{slower}")

    def losing(self, warning: str) -> None:
        """Warn, with what would lose less."""
        note(f"warning: {warning}")

    def measured(self, name: str, done: int, total: int) -> None:
        """Move the layer bar while curves are measured."""
        description = f"measured designs of {name}"
        self._progress.update(self._layers, completed=done, total=total, visible=done < total, description=description)
        self._log.tell(description, done, total)

    def planned(self, plan: "ConversionPlan") -> None:
        """Say what will happen."""
        note(f"{_layers(len(plan.layers))} will be replaced")
        self._progress.update(self._layers, completed=0, total=len(plan.layers), visible=True, description="fitting")

    def calibrating(self, done: int, total: int) -> None:
        """Move the calibration bar."""
        self._progress.update(self._calibration, completed=done, total=total, visible=done < total)
        self._log.tell("calibrating", done, total)

    def fitted(self, record: "LayerRecord", done: int, total: int) -> None:
        """Move the layer bar and name the last layer."""
        description = f"fitted {record.name} (error {record.error:.3f}, {record.seconds:.1f} s)"
        self._progress.update(self._layers, completed=done, total=total, description=description)
        self._log.tell(description, done, total)

    def refined(self, name: str, done: int, total: int) -> None:
        """Name the last block."""
        self._progress.update(self._layers, description=f"refined {name}")
        self._log.tell(f"refined {name}", done, total)

    def writing(self, total_bytes: int) -> None:
        """Say that the output is being written."""
        self._progress.update(self._layers, description=f"writing {size(total_bytes)}")


class StepProgress:
    """A live line with a bar for work of a known number of steps."""

    def __init__(self, description: str) -> None:
        self._progress, self._log = _live_bar(), _Log()
        self._task, self._description = self._progress.add_task(description, total=None), description

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing."""
        self._progress.stop()

    def update(self, done: int, total: int, description: str | None = None) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total, description=description)
        self._log.tell(description or self._description, done, total)


class TrainingProgress(StepProgress):
    """One live line of a training run: step, loss and its parts, rate, speed, memory, held-out loss, remaining time."""

    def __init__(self, steps: int) -> None:
        super().__init__("measuring")
        # until the run says how many it has planned
        self._steps, self._held_out = steps, ""

    def show(self, record: dict[str, Any]) -> None:
        """Take a record of the run."""
        if "layer" in record:
            gained = f"error {record['before']:.3f} -> {record['after']:.3f}"
            self.update(record["matched"], record["of"], f"matched {record['layer']} ({gained})")
            return
        if "held_out_loss" in record:
            self._held_out = f"held out {record['held_out_loss']:.4g}"
            if "perplexity" in record:
                self._held_out += f", perplexity {record['perplexity']:.4g}"
            if "teacher_perplexity" in record:
                self._held_out += f" (teacher {record['teacher_perplexity']:.4g})"
            self.update(record["step"], self._steps, self._held_out)
            return
        self._steps = record["steps"]
        shown = ("step", "steps", "rate", "tokens_per_second")
        parts = " ".join(f"{key} {value:.4g}" for key, value in record.items() if key not in shown)
        speed = f"rate x{record['rate']:.2f}, {count(record['tokens_per_second'])} tokens/s, {size(_peak_memory())}"
        self.update(record["step"], self._steps, f"{parts} | {speed} | {self._held_out}")


def _peak_memory() -> float:
    """Most memory so far in bytes: of the GPU where one is used, of the process otherwise."""
    import resource

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(kilobytes if sys.platform == "darwin" else 1024 * kilobytes)


class Steps:
    """A live line that names what is being done; called with the next step."""

    def __init__(self) -> None:
        self._status = err.status("starting")

    def __enter__(self) -> Self:
        """Start drawing."""
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing."""
        self._status.stop()

    def __call__(self, step: str) -> None:
        """Name the step that begins."""
        self._status.update(step)
