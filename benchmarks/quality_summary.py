"""The two quality tables of docs/results.md: every structure of every model at every budget, one file a model.

    python -m benchmarks.quality_summary benchmarks/results/quality-*.json

A model that is trained again by the same command on a processor that rounds otherwise is another sample of the experiment.
Its scores are not mixed with those of the first in one table.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_table import Summary, summarise

BUDGETS = (0.05, 0.1, 0.25, 0.5)
HEADLINE = ("whitened SVD", "keep, low rank", "keep")
HEADINGS = ("uniform whitened SVD", "`--keep`, low rank only", "`--keep`")
STRUCTURES = (
    "whitened SVD", "SPM", "SPM + companion", "wide blocks + companion", "block SPM", "Monarch", "magnitude 2:4",
    "keep, low rank", "keep",
)  # fmt: skip
ENCODER = "encoder"
MODELS = {"gpt2": "small GPT-2", "llama": "small Llama", ENCODER: "all-MiniLM-L6-v2"}
LABELS = {"keep": "`--keep`", "keep, low rank": "`--keep`, low rank only"}


@dataclass
class Model:
    """The results of a model.

    Attributes:
        dense: score of the dense model.
        cells: by budget and method.
    """

    dense: float
    cells: dict[tuple[float, str], Summary]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    models = read(parser.parse_args().results)
    print("\n".join(headline(models)), "\n".join(structures(models)), sep="\n\n")


def read(files: Iterable[Path]) -> dict[str, Model]:
    """Results by model, those of ``MODELS`` first and in that order.

    Raises:
        ValueError: when two files are about one model.
    """
    models: dict[str, Model] = {}
    for file in sorted(files):
        result = json.loads(file.read_text(encoding="utf-8"))
        key = model_of(result)
        if key in models:
            raise ValueError(f"{file} is about {key}, as a file before it; give one file a model")
        cells = {(summary.keep, summary.method): summary for summary in summarise(result["rows"])}
        models[key] = Model(result["dense_score"], cells)
    return {key: models[key] for key in dict.fromkeys([*MODELS, *models]) if key in models}


def model_of(result: dict[str, Any]) -> str:
    """Which model a result is about."""
    return ENCODER if result["settings"]["encoder"] == "True" else Path(result["settings"]["model"]).name


def headline(models: dict[str, Model]) -> Iterator[str]:
    """Uniform SVD, low rank and ``--keep``: before, and after the same finetune."""
    yield _row("model, score", "kept", *HEADINGS, *(f"finetuned: {heading}" for heading in HEADINGS))
    yield "|" + "---|" * 8
    for key, model in models.items():
        score = "Spearman" if key == ENCODER else f"nats (dense {model.dense:.3f})"
        for keep in BUDGETS:
            found = [model.cells[keep, method] for method in HEADLINE]
            before = [f"{cell.before:.3f}" for cell in found]
            finetuned = [after(cell, 4) for cell in found]
            yield _row(f"{MODELS.get(key, key)}, {score}", f"{keep:.0%}", *before, *finetuned)


def structures(models: dict[str, Model]) -> Iterator[str]:
    """All structures, before and after, with the rate of the finetune."""
    yield _row("model", "structure in every MLP matrix", *(f"{keep:.0%}" for keep in BUDGETS))
    yield "|" + "---|" * 6
    for key, model in models.items():
        cells = model.cells
        for method in STRUCTURES:
            if any((keep, method) in cells for keep in BUDGETS):
                found = (_change(cells.get((keep, method)), method) for keep in BUDGETS)
                yield _row(MODELS.get(key, key), LABELS.get(method, method), *found)


def after(summary: Summary, digits: int) -> str:
    """Score after a finetune: mean and spread of several seeds, or that of the only one, to three digits."""
    if len(summary.after) > 1:
        return f"{summary.mean:.{digits}f} ± {summary.spread:.{digits}f}"
    return f"{summary.mean:.3f}"


def _change(summary: Summary | None, method: str) -> str:
    if summary is None:
        return {"magnitude 2:4": "", "block SPM": "none fits"}.get(method, "not run")
    if summary.mean is None:
        return f"{summary.before:.3f}"
    return f"{summary.before:.3f} → {after(summary, 3)} ({summary.rate:g})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
