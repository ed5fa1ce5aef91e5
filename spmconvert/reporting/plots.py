"""The report's plots, as SVG that takes its colours from the page.

matplotlib draws with stand-in colours, which become CSS variables afterwards, so one drawing is readable on a light and
on a dark page. Heat maps keep their own colours, chosen so that the numbers in them are readable on both. Text stays
text.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from spmconvert.reporting.schema import Layer, MethodResult, Report, TimingRow, shown

# stand-in colours and the CSS they become
_CSS = {
    "#010101": "var(--text)",
    "#010102": "var(--line)",
    "#010103": "var(--page)",
    "#010111": "var(--series-1)",
    "#010112": "var(--series-2)",
    "#010113": "var(--series-3)",
    "#010114": "var(--series-4)",
}
TEXT, LINE, PAGE, FIRST, SECOND, THIRD, FOURTH = _CSS
_STYLE: Any = {
    "svg.fonttype": "none",
    # names are names, also with a dollar in them
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": LINE,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
# of methods, in their order; those that have the dense model's parameters in fewer bits in the colour of text
_METHODS = ((SECOND, "o"), (FIRST, "o"), (THIRD, "o"), (FOURTH, "o"), (TEXT, "s"), (TEXT, "D"))
# more rows than this leave no room for numbers in a heat map
MOST_LABELLED_ROWS = 40
MOST_LABELS = 20
LONGEST_LABEL = 36


def plots(report: Report, prefix: str) -> dict[str, str]:
    """All plots that the report has data for, by name, as SVG elements.

    Args:
        report: what to draw.
        prefix: makes the ids of the drawings unique on a page.
    """
    with mpl.rc_context(_STYLE):
        drawn = {"layers": layer_map(shown(report.layers))}
        if report.timing:
            drawn["timing"] = timing_plot(report.timing)
        if report.training:
            drawn["training"] = training_plot(report)
        scored = [candidate for candidate in report.candidates if candidate.metrics]
        if scored:
            drawn["pareto"] = pareto_plot(scored)
        return {name: _svg(figure, f"{prefix}-{name}") for name, figure in drawn.items()}


def timing_plot(rows: Sequence[TimingRow]) -> Figure:
    """Latency against tokens with the range from p20 to p80, both models; generation is in the table only."""
    figure, (axes,) = _figure(5.4, 3.4)
    forward = [row for row in rows if row.what == "forward"]
    tokens = [row.tokens for row in forward]
    for name, colour, marker in (("dense", SECOND, "s"), ("converted", FIRST, "o")):
        latencies = [getattr(row, name) for row in forward]
        axes.plot(tokens, [latency.p50 for latency in latencies], color=colour, marker=marker, label=name)
        low, high = [latency.p20 for latency in latencies], [latency.p80 for latency in latencies]
        axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(number) for number in tokens])
    axes.set_xlabel("tokens in a call")
    axes.set_ylabel("milliseconds a call")
    # by default a log axis writes formulas
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.legend()
    return figure


def training_plot(report: Report) -> Figure:
    """Held-out loss over steps, one line a finetune."""
    figure, (axes,) = _figure(5.4, 3.2)
    for index, run in enumerate(report.training):
        colour = (FIRST, SECOND, THIRD, FOURTH)[index % 4]
        steps, losses = [point.step for point in run.history], [point.held_out_loss for point in run.history]
        axes.plot(steps, losses, color=colour, marker="o", label=f"run {index + 1}, {run.objective}")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss")
    axes.legend()
    return figure


def pareto_plot(candidates: Sequence[MethodResult]) -> Figure:
    """Quality against bytes (parameters in reports of before they were counted), and time where methods were timed."""
    sized = all(candidate.bytes for candidate in candidates)
    timed = all(candidate.latency for candidate in candidates)
    figure, axes = _figure(5.4, 6.2 if timed else 3.2, rows=2 if timed else 1)
    metric = candidates[0].metrics[0]
    for candidate, (colour, marker) in zip(candidates, _METHODS, strict=False):
        quality = candidate.metrics[0].converted
        amount = (candidate.bytes if sized and candidate.bytes else candidate.parameters) / 1e6
        axes[0].plot(amount, quality, marker, color=colour, label=candidate.title)
        if timed and candidate.latency:
            latency = candidate.latency
            axes[1].plot([latency.p20, latency.p80], [quality, quality], color=colour, alpha=0.5)
            axes[1].plot(latency.p50, quality, marker, color=colour)
    better = "higher is better" if metric.higher_is_better else "lower is better"
    axes[0].set_xlabel("size of the whole model, MB" if sized else "parameters of the whole model, millions")
    for part in axes:
        part.set_ylabel(f"{metric.key}, {better}")
    if timed:
        axes[1].set_xlabel(f"milliseconds for {candidates[0].tokens} tokens, median and p20 to p80")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def layer_map(layers: Sequence[Layer]) -> Figure:
    """Kept parameters and both errors, block by block and kind by kind."""
    kind_of = _kinds(layers)
    kinds = list(dict.fromkeys(kind_of.values()))
    blocks = sorted({_block(layer) for layer in layers})
    panels = (
        ("parameters kept", lambda layer: layer.parameters / layer.dense_parameters, "{:.0%}"),
        ("error", lambda layer: layer.error, "{:.2f}"),
        ("SVD error", lambda layer: layer.baseline_error, "{:.2f}"),
    )
    labels = [kind if len(kind) <= LONGEST_LABEL else f"…{kind[1 - LONGEST_LABEL :]}" for kind in kinds]
    room_for_labels = 0.08 * max(map(len, labels))
    figure, axes = _figure(5.4, 0.8 + room_for_labels + 0.26 * min(len(blocks), 60), columns=3)
    top = max(max(layer.error, layer.baseline_error) for layer in layers)
    for part, (title, value, form) in zip(axes, panels, strict=True):
        grid = [[float("nan")] * len(kinds) for _ in blocks]
        for layer in layers:
            grid[blocks.index(_block(layer))][kinds.index(kind_of[layer.name])] = value(layer)
        highest = 1.0 if title == "parameters kept" else top
        _heat(part, grid, highest, form if len(blocks) <= MOST_LABELLED_ROWS else None)
        part.set_title(title, fontsize=10)
        _thin_ticks(part.set_xticks, labels, rotation=90, fontsize=8)
        part.set_yticks([])
    _thin_ticks(axes[0].set_yticks, [str(block) for block in blocks])
    axes[0].set_ylabel("block")
    return figure


def _thin_ticks(set_ticks: Callable[..., Any], labels: Sequence[str], **style: Any) -> None:
    """Label cells in their middle, and only so many that the labels do not touch."""
    step = -(-len(labels) // MOST_LABELS)
    set_ticks([index + 0.5 for index in range(0, len(labels), step)], labels[::step], **style)


def _heat(axes: Any, grid: list[list[float]], highest: float, form: str | None) -> None:
    # cells as paths: an image would be a bitmap inside the page
    axes.pcolormesh(grid, vmin=0, vmax=highest or 1, cmap="YlOrBr", edgecolors=PAGE, linewidth=1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if form and value == value:
                colour = "#ffffff" if value > 0.6 * (highest or 1) else "#2b1d0e"
                axes.text(x + 0.5, y + 0.5, form.format(value), ha="center", va="center", fontsize=8, color=colour)


def _block(layer: Layer) -> int:
    number = re.search(r"\.(\d+)\.", layer.name)
    return int(number[1]) if number else 0


def _kinds(layers: Sequence[Layer]) -> dict[str, str]:
    """By layer what tells it apart from others of its block, with the name of its stack where there are several."""
    parts = {layer.name: re.match(r"(?:(.*?)\.\d+\.)?(.*)", layer.name) for layer in layers}
    stack_and_kind = {name: (match[1] or "", match[2]) for name, match in parts.items() if match}
    stacks = {stack for stack, _ in stack_and_kind.values()}
    named = [set(stack.split(".")) for stack in stacks if stack]
    shared = set.intersection(*named) if named else set()
    stack_labels = {stack: ".".join(part for part in stack.split(".") if part not in shared) for stack in stacks}
    return {
        name: f"{kind} ({stack_labels[stack]})" if stack_labels[stack] else kind
        for name, (stack, kind) in stack_and_kind.items()
    }


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _svg(figure: Figure, name: str) -> str:
    """The drawing as an svg element with CSS colours, ids of its own, and no fixed size."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # metadata says nothing here, and a style element would reach the whole page
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true" focusable="false"', text, count=1)
    # ids like figure_1 repeat from drawing to drawing
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", text)
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    return text
