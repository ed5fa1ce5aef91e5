"""Read the results of ``benchmarks.quality``: every method at its best rate, over seeds, as a table.

    python -m benchmarks.quality_table results/quality-*.json

The rate of a method at a budget is the one of the least held-out loss with the first seed; all seeds are shown at that
rate, as their mean and how far the one farthest from it is away. The share of the gap is (before - after) /
(before - dense).
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

HEADINGS = (
    "budget", "method", "kept", "time / dense", "before", "after", "gap closed", "divergence", "rate (all tried)", "seeds"
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One method at one budget.

    Attributes:
        method: its name.
        keep: share of the parameters that was allowed.
        kept: share that was used.
        before: score before any finetune.
        time: forward pass over the dense model's, None where it was not measured.
        after: scores by seed after a finetune at the best rate.
        divergence: from the dense model on the scored text after it, mean over seeds, None where it was not measured.
        rate: that rate, None without a finetune.
        tried: all rates of the first seed.
    """

    method: str
    keep: float
    kept: float
    before: float
    time: float | None
    after: tuple[float, ...]
    divergence: float | None
    rate: float | None
    tried: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean score after the finetune."""
        return fmean(self.after) if self.after else None

    @property
    def spread(self) -> float:
        """Distance of the farthest seed from the mean."""
        return max((abs(value - fmean(self.after)) for value in self.after), default=0.0)


def main() -> None:
    """Read the files and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    for file in parser.parse_args().results:
        print(file.stem)
        show(json.loads(file.read_text(encoding="utf-8")))


def summarise(rows: Iterable[dict[str, Any]]) -> list[Summary]:
    """The rows by budget and method, in the order in which they first appear."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["keep"], row["method"]), []).append(row)
    return [_summary(keep, method, own) for (keep, method), own in groups.items()]


def _summary(keep: float, method: str, rows: list[dict[str, Any]]) -> Summary:
    runs = [row for row in rows if "after" in row]
    first = min((row["seed"] for row in runs), default=0)
    tried = {row["rate"]: row["held_out_loss"] for row in runs if row["seed"] == first}
    rate = min(tried, key=tried.__getitem__) if tried else None
    best = [row for row in runs if row["rate"] == rate]
    after = tuple(row["after"] for row in best)
    time, divergence = _mean(rows, "time"), _mean(best, "divergence_after")
    return Summary(method, keep, rows[0]["kept"], rows[0]["before"], time, after, divergence, rate, tuple(sorted(tried)))


def _mean(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if key in row]
    return fmean(found) if found else None


def show(result: dict[str, Any]) -> None:
    """Print the table, in the form that Markdown reads."""
    dense = result["dense_score"]
    table = Table(*HEADINGS, box=box.MARKDOWN)
    for entry in summarise(result["rows"]):
        table.add_row(*_cells(entry, dense))
    console = Console(width=160)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    console.print(f"dense {dense:.4f}")
    console.print(table)


def _cells(entry: Summary, dense: float) -> tuple[str, ...]:
    time = "" if entry.time is None else f"{entry.time:.2f}"
    start = (f"{entry.keep:.0%}", entry.method, f"{entry.kept:.1%}", time, f"{entry.before:.4f}")
    if entry.mean is None:
        return (*start, *[""] * (len(HEADINGS) - len(start)))
    spread = f" ± {entry.spread:.4f}" if len(entry.after) > 1 else ""
    closed = (entry.before - entry.mean) / (entry.before - dense)
    tried = ", ".join(f"{rate:g}" for rate in entry.tried)
    divergence = "" if entry.divergence is None else f"{entry.divergence:.4f}"
    end = (f"{entry.rate:g} ({tried})", str(len(entry.after)))
    return (*start, f"{entry.mean:.4f}{spread}", f"{closed:.1%}", divergence, *end)


if __name__ == "__main__":
    main()
