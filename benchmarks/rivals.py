"""Draw the rivals of a report: quality against time, and against size, one point a method.

    spmconvert report minilm-spm-ft --baselines --data wikitext-2-test.txt
    python -m benchmarks.rivals minilm-spm-ft/report.json --output benchmarks/results/rivals.png

All points are of one report, so of one machine, text and run. Time and size are shares of the untouched model's; the best
corner is the upper left one. A method of many times the untouched model's time (int8 on a processor without products for
it) is named with its share under the axis, since the others would be one point beside it.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from spmconvert.reporting.schema import MethodResult, read_report

OWN = "spm"
# share of the untouched model's time up to which a point is drawn
LONGEST = 2.0


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.json with baselines")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    draw(read_report(options.report).candidates).savefig(options.output, dpi=120, bbox_inches="tight")


def draw(methods: tuple[MethodResult, ...]) -> Figure:
    """Both panels.

    Args:
        methods: of one report, the untouched model first; each with a metric, a time and bytes.

    Raises:
        SystemExit: when the report has no baselines, or did not measure one of these.
    """
    dense = methods[0] if methods else None
    if dense is None or not all(method.metrics and method.latency and method.bytes for method in methods):
        raise SystemExit("the report has no baselines with quality, time and bytes; run spmconvert report --baselines")
    assert dense.latency is not None
    assert dense.bytes is not None
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longer = []
    for index, method in enumerate(methods):
        assert method.latency is not None
        assert method.bytes is not None
        time, size = method.latency.p50 / dense.latency.p50, method.bytes / dense.bytes
        style = {"color": f"C{index}", "marker": "*" if method.key == OWN else "o", "s": 140 if method.key == OWN else 40}
        quality = method.metrics[0].converted
        right.scatter([size], [quality], zorder=3, label=method.title, **style)
        if time > LONGEST:
            longer.append(f"\n{method.title}: {time:.1f}")
        else:
            left.scatter([time], [quality], zorder=3, **style)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    metric = dense.metrics[0]
    left.set_ylabel(metric.title, fontsize=9)
    left.set_xlabel(f"time of {dense.tokens} tokens, share of the untouched model's{''.join(longer)}", fontsize=9)
    right.set_xlabel("bytes, share of the untouched model's", fontsize=9)
    for axes in (left, right):
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    with mpl.rc_context({"font.size": 9}):
        main()
