"""Draw the results of ``benchmarks.quality``: score against budget, a column a model, a line a method.

    python -m benchmarks.quality_plot results/quality-*.json --output results/quality.png

The upper panels are before any finetune, the lower ones after it, at the best rate of every method (see
``benchmarks.quality_table``); a dotted line is the dense model. Methods that miss the range of the others by far are cut
off, and the table has their numbers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.quality_summary import ENCODER, MODELS, read
from benchmarks.quality_table import Summary


def main() -> None:
    """Read the files and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", help="these alone")
    options = parser.parse_args()
    models = read(options.results)
    found = [[entry for entry in model.cells.values() if wanted(entry, options.methods)] for model in models.values()]
    methods = sorted({entry.method for entries in found for entry in entries})
    colours = {method: f"C{index}" for index, method in enumerate(methods)}
    size = (5.2 * len(models), 7.2)
    figure, panels = pyplot.subplots(2, len(models), figsize=size, squeeze=False, sharex="col", layout="constrained")
    for (key, model), entries, (upper, lower) in zip(models.items(), found, panels.T, strict=True):
        draw(upper, [(entry, entry.before, 0.0) for entry in entries], key, model.dense, colours)
        after = [(entry, entry.mean, entry.spread) for entry in entries if entry.mean is not None]
        draw(lower, after, key, model.dense, colours)
        upper.set_title(f"{MODELS.get(key, key)}, before any finetune", fontsize="medium")
        lower.set_title("after the same finetune", fontsize="medium")
        lower.set_xlabel("share of the MLP parameters kept")
    legend = dict(pair for axes in panels.flat for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(options.output, dpi=120)


def wanted(entry: Summary, methods: Sequence[str] | None) -> bool:
    """Whether a method is to be drawn."""
    return methods is None or entry.method in methods


def draw(
    axes: Axes, points: Sequence[tuple[Summary, float, float]], key: str, dense: float, colours: dict[str, str]
) -> None:
    """One panel of scores and spreads; a method has the same colour in all of them."""
    for method, colour in colours.items():
        own = sorted((entry.kept, score, spread) for entry, score, spread in points if entry.method == method)
        if own:
            shares, scores, spreads = zip(*own, strict=True)
            axes.errorbar(shares, scores, spreads, marker="o", markersize=4, linewidth=1.2, label=method, color=colour)
    seen = [score for entry, score, _ in points if entry.method == "whitened SVD"] or [score for _, score, _ in points]
    if seen:
        margin = 0.15 * (max(*seen, dense) - min(*seen, dense))
        axes.set_ylim(min(*seen, dense) - margin, max(*seen, dense) + margin)
    axes.axhline(dense, color="grey", linestyle=":", linewidth=1)
    axes.set_ylabel("Spearman, with the dense model" if key == ENCODER else "cross-entropy, nats a token")


if __name__ == "__main__":
    main()
