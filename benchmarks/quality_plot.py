"""Draw the results of ``benchmarks.quality``: score against budget, a panel a model, a line a method.

    python -m benchmarks.quality_plot results/quality-*.json --output results/quality.png

Before any finetune; a dotted line is the dense model. Methods that miss the range of the others by far are cut off, and the
table has their numbers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes


def main() -> None:
    """Read the files and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, panels = pyplot.subplots(1, len(options.results), figsize=(5.2 * len(options.results), 4), squeeze=False)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in options.results]
    methods = sorted({row["method"] for result in results for row in current(result)})
    colours = {method: f"C{index}" for index, method in enumerate(methods)}
    for result, axes in zip(results, panels[0], strict=True):
        draw(axes, result, colours)
    entries = dict(pair for axes in panels[0] for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(options.output, dpi=120)


def current(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows without a note; the others are from an earlier state of the converter and stay in the table alone."""
    return [row for row in result["rows"] if "note" not in row]


def draw(axes: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """One model's panel; a method has the same colour in all of them."""
    encoder = result["settings"]["encoder"] == "True"
    rows = current(result)
    for method, colour in colours.items():
        own = sorted((row["kept"], row["before"]) for row in rows if row["method"] == method)
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", markersize=4, linewidth=1.2, label=method, color=colour)
    baseline = [row["before"] for row in rows if row["method"] == "whitened SVD"]
    margin = 0.15 * (max(baseline) - min(baseline))
    axes.set_ylim(min(*baseline, result["dense_score"]) - margin, max(*baseline, result["dense_score"]) + margin)
    axes.axhline(result["dense_score"], color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("share of the MLP parameters kept")
    axes.set_ylabel("Spearman correlation with the dense model" if encoder else "cross-entropy, nats a token")
    name = "all-MiniLM-L6-v2" if encoder else Path(result["settings"]["model"]).name
    axes.set_title(f"{name}, before any finetune", fontsize="medium")


if __name__ == "__main__":
    main()
