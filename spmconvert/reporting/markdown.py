"""The report in the model card: one section between two marker comments, replaced whenever a report is made.

Everything outside of the markers is left alone, so a card can be edited by hand.
"""

from spmconvert.reporting.schema import Report
from spmconvert.reporting.summary import describe_call, describe_error, findings
from spmconvert.units import count, measured, milliseconds, size

BEGIN = "<!-- spmconvert report: begin -->"
END = "<!-- spmconvert report: end -->"


def section(report: Report) -> str:
    """The section, markers included."""
    machine = report.machine
    where = (
        f"{machine.processor} ({machine.device}, {machine.threads} threads), {report.model.dtype}, {report.created[:10]}"
    )
    lines = [BEGIN, "", "## Measured", "", f"Weights `{report.model.weights_sha256[:16]}`, on {where}.", ""]
    lines += [f"- {finding}" for finding in findings(report)]
    lines += ["", "| amount | scope | dense | converted | left |", "|---|---|---|---|---|"]
    for quantity in report.quantities:
        shown = [size(n) if quantity.unit == "B" else count(n) for n in (quantity.dense, quantity.converted)]
        share = quantity.converted / quantity.dense
        lines.append(f"| {quantity.what} | {quantity.scope} | {shown[0]} | {shown[1]} | {share:.1%} |")
    for text in report.quality:
        lines += ["", f"Quality on `{text.text}`: {text.rows_from}.", ""]
        lines += ["| measure | dense | converted | on |", "|---|---|---|---|"]
        for metric in text.metrics:
            values = f"{measured(metric.dense, metric.unit)} | {measured(metric.converted, metric.unit)}"
            lines.append(f"| {metric.title} | {values} | {describe_error(metric)} |")
    if report.timing:
        lines += ["", "Time of a call in ms, p20 / p50 / p80, dense and converted in turn.", ""]
        lines += ["| call | dense | converted | dense / converted | verdict | samples |", "|---|---|---|---|---|---|"]
        for row in report.timing:
            times = [
                " / ".join(milliseconds(value) for value in (one.p20, one.p50, one.p80))
                for one in (row.dense, row.converted)
            ]
            outcome = f"{row.ratio:.2f} | {row.verdict} | {row.dense.samples}"
            lines.append(f"| {describe_call(row)} | {times[0]} | {times[1]} | {outcome} |")
    return "\n".join([*lines, "", END])


def refreshed(card: str, report: Report) -> str:
    """A model card with this report's section in the place of an older one, or at the end."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{section(report)}{after}"
    return f"{card.rstrip()}\n\n{section(report)}\n"
