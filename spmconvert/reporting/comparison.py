"""Several converted checkpoints side by side.

Each was timed against its own dense model in its own run, so times are compared as ratios; measures of quality stand in one
row only where they are of the same kind and on the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spmconvert.reporting.schema import Report
from spmconvert.reporting.summary import describe_call
from spmconvert.units import count, measured, size


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        what: what is compared.
        values: one a report, a dash where a report has none.
    """

    what: str
    values: tuple[str, ...]


def rows(reports: Sequence[Report]) -> list[Row]:
    """Everything that at least one of the reports has."""
    texts: dict[str, set[str]] = {}
    for report in reports:
        for text in report.quality:
            texts.setdefault(text.text, set()).add(text.sha256)
    ambiguous = {name for name, hashes in texts.items() if len(hashes) > 1}
    columns = [_column(report, ambiguous) for report in reports]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [Row(key, tuple(column.get(key, "–") for column in columns)) for key in keys]


def _column(report: Report, ambiguous: set[str]) -> dict[str, str]:
    """By what is compared; texts that share their name are told apart by their hash."""
    column = {"source": report.model.source_sha256[:12], "finetuned": "yes" if report.model.finetuned else "no"}
    for quantity in report.quantities:
        shown = size(quantity.converted) if quantity.unit == "B" else count(quantity.converted)
        column[f"{quantity.what}, {quantity.scope}"] = f"{shown} ({quantity.converted / quantity.dense:.1%})"
    for text in report.quality:
        name = f"{text.text} ({text.sha256[:8]})" if text.text in ambiguous else text.text
        for metric in text.metrics:
            column[f"{metric.title}, on {name}"] = measured(metric.converted, metric.unit)
    for row in report.timing:
        column[f"dense time / converted time, {describe_call(row)}"] = f"{row.ratio:.2f}× ({row.verdict})"
    median = sorted(layer.error for layer in report.layers)[len(report.layers) // 2]
    column["median layer error at conversion"] = f"{median:.4f}"
    return column
