"""The report as rich tables; ``console`` prints what these functions return."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spmconvert.checkpoint.unfinished import Unfinished
from spmconvert.reporting import comparison
from spmconvert.reporting.schema import MethodResult, Report, shown
from spmconvert.reporting.summary import KeyFigure, describe_call, describe_error, findings, key_figures, outcome
from spmconvert.reporting.verdict import verdict
from spmconvert.units import count, measured, measured_size, milliseconds, size

STYLES = {"good": "green", "bad": "red", "plain": "", "faster": "green", "slower": "red", "no clear difference": ""}
# the rest of a longer table is on the page and in report.json
MOST_LAYERS = 24


def report_view(report: Report) -> RenderableType:
    """One report."""
    machine, found = report.machine, verdict(report)
    where = (
        f"{machine.processor} ({machine.device}, {machine.threads} of {machine.cores} cores, load {machine.load}), "
        f"{report.model.dtype}, {report.created}"
    )
    parts: list[RenderableType] = [
        Text.assemble((found.text, STYLES[found.tone])),
        Text.assemble((report.model.name, "bold"), f"  {report.model.architecture}, {len(report.layers)} layers replaced"),
        Text(where, style="dim"),
        "",
        _figures(key_figures(report)),
        "",
        _layers(report),
        Text(f"error: E‖y-ŷ‖²/E‖y‖² at conversion, before finetuning; {report.layer_errors_on}", style="dim"),
        "",
        _quantities(report),
    ]
    if report.quality:
        parts += ["", _quality(report)]
    if report.timing:
        parts += ["", _timing(report)]
    if report.candidates:
        parts += ["", _candidates(report.candidates)]
    if report.tasks:
        parts += ["", _tasks(report)]
    for sample in report.generations:
        parts += ["", Text.assemble(("prompt     ", "dim"), sample.prompt.replace("\n", " "))]
        parts += [Text.assemble((f"{which:<11}", "dim"), getattr(sample, which).replace("\n", " ")) for which in ANSWERS]
    return Group(*parts, "", *(Text(f"- {finding}") for finding in findings(report)))


ANSWERS = ("dense", "converted")


def comparison_view(reports: Sequence[Report]) -> RenderableType:
    """Several reports side by side."""
    table = _table("", *(report.model.name for report in reports))
    for row in comparison.rows(reports):
        table.add_row(row.what, *row.values)
    return table


def unfinished_view(run: Unfinished) -> RenderableType:
    """What an unfinished run has so far."""
    table = _table("finished layer", "in x out", "kept", "error", "SVD same size", "time")
    for layer in run.layers:
        table.add_row(
            layer["name"],
            f"{layer['in_features']} x {layer['out_features']}",
            f"{layer['parameters'] / layer['dense_parameters']:.1%}",
            f"{layer['error']:.4f}",
            f"{layer['baseline_error']:.4f}",
            f"{layer['seconds']:.1f} s",
        )
    state = Text(f"{run.output} is not finished: {run.progress}.")
    remedy = Text("Continue with the command that made it and --resume; a report needs the finished checkpoint.")
    return Group(state, remedy, "", table) if run.layers else Group(state, remedy)


def outcome_view(report: Report) -> RenderableType:
    """What a command ends with: the whole model's size, speed and quality."""
    return _figures(outcome(report))


def _figures(figures: Sequence[KeyFigure]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for figure in figures:
        table.add_row(Text(figure.label), Text(figure.value, style=f"bold {STYLES[figure.tone]}"), Text(figure.detail))
    return table


def _layers(report: Report) -> Table:
    table = _table("layer", "in x out", "design", "kept", "error", "SVD same size")
    lines = shown(report.layers)
    for layer in lines[:MOST_LAYERS]:
        table.add_row(
            layer.name,
            f"{layer.in_features} x {layer.out_features}",
            layer.design,
            f"{layer.parameters / layer.dense_parameters:.1%}",
            f"{layer.error:.4f}",
            f"{layer.baseline_error:.4f}",
        )
    if len(lines) > MOST_LAYERS:
        table.add_row(f"... {len(lines) - MOST_LAYERS} more in report.html")
    return table


def _quantities(report: Report) -> Table:
    table = _table("amount", "dense", "converted", "left")
    for quantity in report.quantities:
        shown = [size(n) if quantity.unit == "B" else count(n) for n in (quantity.dense, quantity.converted)]
        table.add_row(f"{quantity.what}, {quantity.scope}", *shown, f"{quantity.converted / quantity.dense:.1%}")
    return table


def _quality(report: Report) -> Table:
    table = _table("quality against the dense model", "text", "dense", "converted", "samples", "better is")
    for text in report.quality:
        for metric in text.metrics:
            values = (measured(metric.dense, metric.unit), measured(metric.converted, metric.unit))
            direction = "higher" if metric.higher_is_better else "lower"
            table.add_row(metric.title, text.text, *values, describe_error(metric), direction)
    return table


def _timing(report: Report) -> Table:
    table = _table("ms a call, p20 / p50 / p80", "input", "dense", "converted", "ratio", "verdict", "samples")
    for row in report.timing:
        times = [
            " / ".join(milliseconds(value) for value in (latency.p20, latency.p50, latency.p80))
            for latency in (row.dense, row.converted)
        ]
        verdict = Text(row.verdict, style=STYLES[row.verdict])
        table.add_row(describe_call(row), row.shape, *times, f"{row.ratio:.2f}", verdict, str(row.dense.samples))
    return table


def _candidates(candidates: Sequence[MethodResult]) -> Table:
    metrics = [metric.title for metric in candidates[0].metrics]
    table = _table("method", "parameters", "in layers", "bytes", *metrics, f"ms, {candidates[0].tokens} tokens")
    for candidate in candidates:
        values = [measured(metric.converted, metric.unit) for metric in candidate.metrics]
        time = "–" if candidate.latency is None else milliseconds(candidate.latency.p50)
        sizes = (count(candidate.parameters), count(candidate.layer_parameters), measured_size(candidate.bytes))
        table.add_row(candidate.title, *sizes, *values, time)
    return table


def _tasks(report: Report) -> Table:
    table = _table("task", "metric", "dense", "converted", "standard error", "samples")
    for task in report.tasks:
        values = [measured(value, "") for value in (task.dense, task.converted, task.standard_error)]
        table.add_row(task.task, task.metric, *values, str(task.samples))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table
