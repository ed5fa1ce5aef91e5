"""Draw the results of ``benchmarks.quality``: score against budget, a column a model, a line a method.

    python -m benchmarks.quality_plot results/quality-*.json --output results/quality.png

The upper panels are before any finetune, the lower ones after it, at the best rate of every method (see
``benchmarks.quality_table``); a dotted line is the dense model. Methods that miss the range of the others by far are cut
off, and the table has their numbers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.quality_table import Summary, summarise


def main() -> None:
    """Read the files and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", help="these alone")
    options = parser.parse_args()
    results = [json.loads(file.read_text(encoding="utf-8")) for file in options.results]
    found = [[entry for entry in summarise(result["rows"]) if wanted(entry, options.methods)] for result in results]
    methods = sorted({entry.method for entries in found for entry in entries})
    colours = {method: f"C{index}" for index, method in enumerate(methods)}
    size = (5.2 * len(results), 7.2)
    figure, panels = pyplot.subplots(2, len(results), figsize=size, squeeze=False, sharex="col", layout="constrained")
    for result, entries, (upper, lower) in zip(results, found, panels.T, strict=True):
        draw(upper, [(entry, entry.before, 0.0) for entry in entries], result, colours)
        after = [(entry, entry.mean, entry.spread) for entry in entries if entry.mean is not None]
        draw(lower, after, result, colours)
        upper.set_title(f"{model_name(result)}, before any finetune", fontsize="medium")
        lower.set_title("after the same finetune", fontsize="medium")
        lower.set_xlabel("share of the MLP parameters kept")
    legend = dict(pair for axes in panels.flat for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(options.output, dpi=120)


def wanted(entry: Summary, methods: Sequence[str] | None) -> bool:
    """Whether a method is to be drawn."""
    return methods is None or entry.method in methods


def draw(
    axes: Axes, points: Sequence[tuple[Summary, float, float]], result: dict[str, Any], colours: dict[str, str]
) -> None:
    """One panel of scores and spreads; a method has the same colour in all of them."""
    for method, colour in colours.items():
        own = sorted((entry.kept, score, spread) for entry, score, spread in points if entry.method == method)
        if own:
            shares, scores, spreads = zip(*own, strict=True)
            axes.errorbar(shares, scores, spreads, marker="o", markersize=4, linewidth=1.2, label=method, color=colour)
    dense = result["dense_score"]
    seen = [score for entry, score, _ in points if entry.method == "whitened SVD"] or [score for _, score, _ in points]
    if seen:
        margin = 0.15 * (max(*seen, dense) - min(*seen, dense))
        axes.set_ylim(min(*seen, dense) - margin, max(*seen, dense) + margin)
    axes.axhline(dense, color="grey", linestyle=":", linewidth=1)
    axes.set_ylabel("Spearman, with the dense model" if is_encoder(result) else "cross-entropy, nats a token")


def is_encoder(result: dict[str, Any]) -> bool:
    """Whether the scores are those of an encoder."""
    return bool(result["settings"]["encoder"] == "True")


def model_name(result: dict[str, Any]) -> str:
    """What to call the model."""
    return "all-MiniLM-L6-v2" if is_encoder(result) else Path(result["settings"]["model"]).name


if __name__ == "__main__":
    main()
