"""The only module that prints: tables, progress and errors of the command line.

Results go to standard output; progress, notes and errors go to standard error, so that ``--json`` can be piped.
"""

import json
import logging
import shlex
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spmconvert.units import count, duration, size

if TYPE_CHECKING:
    from spmconvert.conversion import Conversion
    from spmconvert.exporting import Export
    from spmconvert.finetuning import Finetuned
    from spmconvert.layerfit import LayerRecord
    from spmconvert.plan import ConversionPlan
    from spmconvert.recipe import Recipe

# between two lines about progress in a log
LOG_SECONDS = 30.0
# a pipe or a file has no width; wide enough that no name is folded
# names and paths may hold brackets and colons, which are not markup
_out = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def error(message: str) -> None:
    """Print one error line."""
    _err.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)


def note(message: str) -> None:
    """Print one line that is not part of the result."""
    _err.print(Text(message), soft_wrap=True)


def data(value: Any) -> None:
    """Print a result as JSON."""
    _out.out(json.dumps(value, indent=2), highlight=False)


def silence_libraries() -> None:
    """Turn off the progress bars of transformers, which would break into ours, and news of weights that stay on disk."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def _live_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=_err,
        transient=True,
        # it would leave an empty line
        disable=not _err.is_terminal,
    )


class _Log:
    """A line now and then about how far work is, where no bar can be drawn: in a pipe or a file."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, what: str, done: int, total: int) -> None:
        """Say it, unless there is a bar or the last line was a moment ago."""
        if not _err.is_terminal and time.monotonic() - self._last >= LOG_SECONDS:
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

    def writing(self, total_bytes: int) -> None:
        """Say that the output is being written."""
        self._progress.update(self._layers, description=f"writing {size(total_bytes)}")


def show_conversion(conversion: "Conversion", began: float) -> None:
    """The table at the end of a conversion, totals, and the next command."""
    table = Table(title=None, box=None, pad_edge=False)
    for column in ("layer", "in x out", "design", "kept", "error", "SVD same size", "time"):
        table.add_column(column, justify="left" if column in ("layer", "design") else "right", overflow="fold")
    for record in conversion.layers:
        table.add_row(
            record.name,
            f"{record.in_features} x {record.out_features}",
            record.design,
            f"{record.parameters / record.dense_parameters:.1%}",
            f"{record.error:.4f}",
            f"{record.baseline_error:.4f}",
            f"{record.seconds:.1f} s",
        )
    _out.print(table)
    before = sum(record.dense_parameters for record in conversion.layers)
    after = sum(record.parameters for record in conversion.layers)
    totals = (
        f"replaced layers {count(before)} -> {count(after)} parameters ({after / before:.1%}); "
        f"checkpoint {count(conversion.parameters_before)} -> {count(conversion.parameters_after)} parameters, "
        f"{size(conversion.bytes_before)} -> {size(conversion.bytes_after)}; {duration(time.monotonic() - began)}"
    )
    _out.print(totals, soft_wrap=True)
    if conversion.choice is not None:
        bound = conversion.choice.bound
        parts = [f"budget: {conversion.spent}"]
        parts += [f"no choice of these designs is below {bound:.4g}"] if bound else []
        parts += [f"{conversion.left_dense} layers stay dense"] if conversion.left_dense else []
        _out.print(", ".join(parts), soft_wrap=True)
    _out.print(f"error: {conversion.measured_on}", soft_wrap=True)
    if conversion.above_limit:
        names = ", ".join(conversion.above_limit)
        _out.print(f"the final fits of {names} came out above the largest error that was allowed", soft_wrap=True)
    _out.print(f"next: spmconvert finetune {shlex.quote(str(conversion.output))} --data TEXT, or load it:", soft_wrap=True)
    _out.print(f"  import spmconvert; model = spmconvert.load({str(conversion.output)!r})", soft_wrap=True)


def plan_rows(plan: "ConversionPlan") -> list[dict[str, Any]]:
    """The planned layers as plain values."""
    rows = []
    for layer in plan.layers:
        g = layer.spec.geometry
        dense_flops, flops = layer.flops
        rows.append(
            {
                "layer": layer.target.name,
                "in_features": g.in_features,
                "out_features": g.out_features,
                "width": g.width,
                "stages": g.stages,
                "variant": g.variant,
                "block": g.block,
                "rank": g.rank,
                "parameters_before": layer.dense_parameters,
                "parameters_after": layer.parameters,
                "bytes_before": layer.dense_bytes,
                "bytes_after": layer.bytes,
                "flops_per_token_before": dense_flops,
                "flops_per_token_after": flops,
            }
        )
    return rows


def show_plan(plan: "ConversionPlan", recipe: "Recipe", output: str) -> None:
    """What a conversion would do."""
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "in x out", "design", "parameters", "bytes", "FLOPs/token"):
        table.add_column(column, justify="left" if column in ("layer", "design") else "right", overflow="fold")
    rows = plan_rows(plan)
    for layer, row in zip(plan.layers, rows, strict=True):
        table.add_row(
            row["layer"],
            f"{row['in_features']} x {row['out_features']}",
            layer.spec.geometry.describe(),
            f"{count(row['parameters_before'])} -> {count(row['parameters_after'])}",
            f"{size(row['bytes_before'])} -> {size(row['bytes_after'])}",
            f"{count(row['flops_per_token_before'])} -> {count(row['flops_per_token_after'])}",
        )
    _out.print(table)
    before, after = (sum(row[key] for row in rows) for key in ("parameters_before", "parameters_after"))
    kept = f"{count(before)} -> {count(after)} parameters ({after / before:.1%} of theirs kept)"
    _out.print(f"{_layers(len(rows))} to replace, {kept}")
    for skipped in plan.selection.skipped:
        _out.print(f"left alone: {skipped.name} ({skipped.reason})", soft_wrap=True)
    calibrated = recipe.calibration.file is not None
    _out.print(
        f"would write {size(plan.output_bytes)} to {output}; fits take about {duration(plan.predicted_seconds(recipe))} "
        f"on this machine's CPU{' after the calibration run' if calibrated else ''}, "
        f"with about {size(plan.predicted_memory(calibrated=calibrated))} of memory beside the program",
        soft_wrap=True,
    )


def show_spent(spent: str) -> None:
    """What a budget would be spent on, in words."""
    _out.print(f"budget: {spent}", soft_wrap=True)


def _layers(number: int) -> str:
    return f"{number} layer{'' if number == 1 else 's'}"


def show_budgets(rows: list[dict[str, Any]], loss_name: str) -> None:
    """What other budgets would buy."""
    table = Table(box=None, pad_edge=False)
    columns = ("--keep", loss_name, "low rank", "stages", "stages + companion", "left dense", "checkpoint")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        counts = (str(row[key]) for key in ("low_rank", "stages", "stages_with_companion", "dense"))
        table.add_row(f"{row['keep']:.0%}", f"{row['predicted_loss']:.4g}", *counts, size(row["output_bytes"]))
    _out.print(table)
    _out.print(f"{loss_name}: against the dense model, before any finetune", soft_wrap=True)


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
        shown = ("step", "rate", "tokens_per_second")
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


_COMPARED = {
    "logits": "KL to the source's words",
    "classes": "KL to the source's classes",
    "scores": "squared distance to the source's scores",
    "hidden": "distance of hidden states",
}


def show_finetuned(result: "Finetuned", seconds: float) -> None:
    """What a finetune reached, and the next command."""
    first, last = result.history[0], min(result.history, key=lambda record: record["held_out_loss"])
    _out.print(
        f"{_COMPARED[result.objective]}, held out: {result.start_loss:.4g} -> {result.best_loss:.4g} "
        f"after {result.steps} steps, {count(result.tokens)} tokens, {duration(seconds)}",
        soft_wrap=True,
    )
    if "perplexity" in last:
        teacher = f"; source {first['teacher_perplexity']:.4g}" if "teacher_perplexity" in first else ""
        _out.print(f"perplexity, held out: {first['perplexity']:.4g} -> {last['perplexity']:.4g}{teacher}", soft_wrap=True)
    if result.stopped:
        _out.print(f"stopped early: {result.stopped}; the best state before it was kept", soft_wrap=True)
    _out.print(f"written to {result.output}; load it:", soft_wrap=True)
    _out.print(f"  import spmconvert; model = spmconvert.load({str(result.output)!r})", soft_wrap=True)


def show(renderable: RenderableType) -> None:
    """Print a result that another module has laid out."""
    _out.print(renderable)


class Steps:
    """A live line that names what is being done; called with the next step."""

    def __init__(self) -> None:
        self._status = _err.status("starting")

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


def show_export(result: "Export") -> None:
    """What was exported, and how well it matches."""
    compared = "not compared, the model reads no tokens"
    if result.difference is not None:
        compared = f"differ by {result.difference:.2g} of the largest at most, {result.tolerance:g} is allowed"
    _out.print(f"{result.layers} layers are dense again, {size(result.bytes)}; outputs {compared}", soft_wrap=True)
    if result.added_biases:
        _out.print(
            f"turned on in config.json: {', '.join(result.added_biases)}, for biases of the conversion", soft_wrap=True
        )
    _out.print(f"wrote {result.output}, which loads without spmconvert", soft_wrap=True)
