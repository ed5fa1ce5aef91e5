"""Results of commands as tables and sentences on standard output."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from spmconvert.units import count, duration, size

if TYPE_CHECKING:
    from spmconvert.commands.conversion import Conversion
    from spmconvert.commands.export import Export
    from spmconvert.commands.finetune import Finetuned
    from spmconvert.plan.plan import ConversionPlan
    from spmconvert.recipe.recipe import Recipe
from spmconvert.cli.console import out


def show_conversion(conversion: "Conversion", began: float) -> None:
    """The table at the end of a conversion, totals, and the next command."""
    # only for this: torch takes a second
    from spmconvert.fit.layer import shown

    table = Table(title=None, box=None, pad_edge=False)
    for column in ("layer", "in x out", "design", "kept", "error", "SVD same size", "time"):
        table.add_column(column, justify="left" if column in ("layer", "design") else "right", overflow="fold")
    records = shown(conversion.layers)
    if any(record.warning for record in records):
        table.add_column("", justify="left", overflow="fold")
    for record in records:
        table.add_row(
            record.name,
            f"{record.in_features} x {record.out_features}",
            record.design,
            f"{record.parameters / record.dense_parameters:.1%}",
            f"{record.error:.4f}",
            f"{record.baseline_error:.4f}",
            f"{record.seconds:.1f} s",
            *([record.warning] if record.warning else []),
        )
    out.print(table)
    before = sum(record.dense_parameters for record in conversion.layers)
    after = sum(record.parameters for record in conversion.layers)
    totals = (
        f"replaced layers {count(before)} -> {count(after)} parameters ({after / before:.1%}); "
        f"checkpoint {count(conversion.parameters_before)} -> {count(conversion.parameters_after)} parameters, "
        f"{size(conversion.bytes_before)} -> {size(conversion.bytes_after)}; {duration(time.monotonic() - began)}"
    )
    out.print(totals, soft_wrap=True)
    if conversion.choice is not None:
        bound = conversion.choice.bound
        parts = [f"budget: {conversion.budget_note}{_chosen_on(conversion.choosing_rows)}"]
        parts += [f"no choice of these designs is below {bound:.4g}"] if bound else []
        parts += [f"{conversion.left_dense} layers stay dense"] if conversion.left_dense else []
        out.print(", ".join(parts), soft_wrap=True)
    out.print(f"error: {conversion.measured_on}", soft_wrap=True)
    if conversion.speed is not None:
        speed = conversion.speed
        out.print(
            f"forward pass of {speed['rows']} x {speed['tokens']} tokens on {speed['device']}: {speed['measured']:.2f} "
            f"times faster, {speed['predicted']:.2f} by the times of its layers, {speed['wanted']:g} wanted",
            soft_wrap=True,
        )
    if conversion.above_limit:
        names = ", ".join(conversion.above_limit)
        out.print(f"the final fits of {names} came out above the largest error that was allowed", soft_wrap=True)


def show_next(output: Path) -> None:
    """What to do with a conversion."""
    out.print(f"next: spmconvert finetune {shlex.quote(str(output))}, or load it:", soft_wrap=True)
    out.print(f"  import spmconvert; model = spmconvert.load({str(output)!r})", soft_wrap=True)


def plan_rows(plan: "ConversionPlan") -> list[dict[str, Any]]:
    """The planned layers as plain values."""
    rows = []
    for layer in plan.layers:
        design = layer.spec.design
        dense_flops, flops = layer.flops
        rows.append(
            {
                "layer": layer.target.name,
                "in_features": design.in_features,
                "out_features": design.out_features,
                "terms": design.to_json(),
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
            layer.spec.design.describe(),
            f"{count(row['parameters_before'])} -> {count(row['parameters_after'])}",
            f"{size(row['bytes_before'])} -> {size(row['bytes_after'])}",
            f"{count(row['flops_per_token_before'])} -> {count(row['flops_per_token_after'])}",
        )
    out.print(table)
    before, after = (sum(row[key] for row in rows) for key in ("parameters_before", "parameters_after"))
    parameters_left = f"{count(before)} -> {count(after)} parameters ({after / before:.1%} of theirs kept)"
    out.print(f"{_layers(len(rows))} to replace, {parameters_left}")
    for skipped in plan.selection.skipped:
        out.print(f"left alone: {skipped.name} ({skipped.reason})", soft_wrap=True)
    calibrated = recipe.calibration.file is not None
    out.print(
        f"would write {size(plan.output_bytes)} to {output}; fits take about {duration(plan.predicted_seconds(recipe))} "
        f"on this machine's CPU{' after the calibration run' if calibrated else ''}, "
        f"with about {size(plan.predicted_memory(calibrated=calibrated))} of memory beside the program",
        soft_wrap=True,
    )


def _chosen_on(rows: int) -> str:
    return f" on the {rows} rows that chose the designs" if rows else ""


def show_spent(spent: str) -> None:
    """What a budget would be spent on, in words."""
    out.print(f"budget: {spent}", soft_wrap=True)


def _layers(number: int) -> str:
    return f"{number} layer{'' if number == 1 else 's'}"


def show_budgets(rows: list[dict[str, Any]], loss_name: str) -> None:
    """What other budgets would buy; of time where rows have a ``speedup``, of parameters otherwise."""
    table = Table(box=None, pad_edge=False)
    timed = any("speedup" in row for row in rows)
    columns = ("--speedup" if timed else "--keep", loss_name, "layers", "checkpoint")
    for column in columns:
        table.add_column(column, justify="left" if column == "layers" else "right")
    for row in rows:
        layers = ", ".join(f"{number} {kinds}" for kinds, number in row["layers"].items())
        asked = f"{row['speedup']:g}" if timed else f"{row['keep']:.0%}"
        table.add_row(asked, f"{row['predicted_loss']:.4g}", layers, size(row["output_bytes"]))
    out.print(table)
    out.print(f"{loss_name}: against the dense model, on the rows that choose, before any finetune", soft_wrap=True)


_COMPARED = {
    "logits": "KL to the source's words",
    "classes": "KL to the source's classes",
    "scores": "squared distance to the source's scores",
    "hidden": "distance of hidden states",
}


def show_finetuned(result: "Finetuned", seconds: float) -> None:
    """What a finetune reached, and the next command."""
    first, last = result.history[0], min(result.history, key=lambda record: record["held_out_loss"])
    out.print(
        f"{_COMPARED[result.objective]}, held out: {result.start_loss:.4g} -> {result.best_loss:.4g} "
        f"after {result.steps} steps, {count(result.tokens)} tokens, {duration(seconds)}",
        soft_wrap=True,
    )
    if "perplexity" in last:
        teacher = f"; source {first['teacher_perplexity']:.4g}" if "teacher_perplexity" in first else ""
        out.print(f"perplexity, held out: {first['perplexity']:.4g} -> {last['perplexity']:.4g}{teacher}", soft_wrap=True)
    if result.stopped:
        out.print(f"stopped early: {result.stopped}; the best state before it was kept", soft_wrap=True)
    out.print(f"written to {result.output}; load it:", soft_wrap=True)
    out.print(f"  import spmconvert; model = spmconvert.load({str(result.output)!r})", soft_wrap=True)


def show_export(result: "Export") -> None:
    """What was exported, and how well it matches."""
    compared = f"outputs {result.compared}"
    if result.difference is not None:
        compared = (
            f"outputs ({result.compared}) differ by {result.difference:.2g} of the largest at most, "
            f"{result.tolerance:g} is allowed"
        )
    done = "dense again" if result.form == "dense" else f"written as {result.form}"
    out.print(f"{result.layers} layers are {done}, {size(result.bytes)}; {compared}", soft_wrap=True)
    if result.added_biases:
        out.print(
            f"turned on in config.json: {', '.join(result.added_biases)}, for biases of the conversion", soft_wrap=True
        )
    if result.note:
        out.print(result.note, soft_wrap=True)
    out.print(f"wrote {result.output}, which runs without spmconvert", soft_wrap=True)
