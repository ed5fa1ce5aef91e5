"""The report as one HTML file: no script, no font, no picture from anywhere else.

The template holds structure and style, this module what it needs to know. Every plot has the table of its numbers
beside it, and says nothing to a screen reader that the table does not. Colours follow the reader's light or dark
setting.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from spmconvert import units
from spmconvert.escaping import visible
from spmconvert.reporting import comparison, summary
from spmconvert.reporting.plots import plots
from spmconvert.reporting.schema import Quantity, Report, shown
from spmconvert.reporting.verdict import verdict

TEMPLATE = "report.html.j2"


def render(reports: Sequence[Report]) -> str:
    """One page for one report, or for several side by side."""
    environment = Environment(
        finalize=_visible, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=units.count,
        ms=units.milliseconds,
        measured=units.measured,
        size=units.measured_size,
        amount=amount,
        pretty_json=_pretty_json,
    )
    template = environment.from_string(files("spmconvert.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    parts = [_part(report, f"m{index}") for index, report in enumerate(reports)]
    names = [report.model.name for report in reports]
    return template.render(
        parts=parts,
        title=f"{names[0]}: what the conversion gained and lost" if len(names) == 1 else f"{', '.join(names)} side by side",
        comparison=comparison.rows(reports) if len(reports) > 1 else [],
        names=names,
        shown=shown,
        describe_call=summary.describe_call,
        describe_error=summary.describe_error,
    )


def amount(quantity: Quantity, number: int) -> str:
    """A quantity's number with its unit, in readable digits."""
    return units.size(number) if quantity.unit == "B" else units.count(number)


def _part(report: Report, prefix: str) -> dict[str, Any]:
    # the drawings are ours and escape their own text
    drawn = {name: Markup(visible(svg)) for name, svg in plots(report, prefix).items()}
    return {
        "id": prefix,
        "report": report,
        "verdict": verdict(report),
        "figures": summary.key_figures(report),
        "findings": summary.findings(report),
        "plots": drawn,
    }


def _visible(value: Any) -> Any:
    """What the template is given, before jinja escapes its markup; our own markup stays as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pretty_json(value: Any) -> str:
    return json.dumps(value, indent=2)
