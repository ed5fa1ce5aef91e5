"""The report as a section of the model card, in Markdown; ``checkpoint.card`` puts it in its place."""

from spmconvert.escaping import code, markdown
from spmconvert.reporting.schema import Report
from spmconvert.reporting.summary import describe_call, describe_error, findings
from spmconvert.reporting.verdict import verdict
from spmconvert.units import count, measured, milliseconds, size


def section(report: Report) -> str:
    """The section, without its markers."""
    machine = report.machine
    on = f"{markdown(machine.processor)} ({machine.device}, {machine.threads} threads)"
    where = f"{on}, {report.model.dtype}, {report.created[:10]}"
    lines = ["## Measured", "", f"Weights `{report.model.weights_sha256[:16]}`, on {where}.", ""]
    lines += [f"**{markdown(verdict(report).text)}**", ""]
    lines += [f"- {markdown(finding)}" for finding in findings(report)]
    lines += ["", "| amount | scope | dense | converted | left |", "|---|---|---|---|---|"]
    for quantity in report.quantities:
        shown = [size(n) if quantity.unit == "B" else count(n) for n in (quantity.dense, quantity.converted)]
        share = quantity.converted / quantity.dense
        lines.append(f"| {quantity.what} | {quantity.scope} | {shown[0]} | {shown[1]} | {share:.1%} |")
    for text in report.quality:
        lines += ["", f"Quality on {code(text.text)}: {markdown(text.rows_from)}.", ""]
        lines += ["| measure | dense | converted | on |", "|---|---|---|---|"]
        for metric in text.metrics:
            values = f"{measured(metric.dense, metric.unit)} | {measured(metric.converted, metric.unit)}"
            lines.append(f"| {markdown(metric.title)} | {values} | {markdown(describe_error(metric))} |")
    if report.timing:
        lines += ["", "Time of a call in ms, p20 / p50 / p80, dense and converted in turn.", ""]
        lines += ["| call | dense | converted | dense / converted | verdict | samples |", "|---|---|---|---|---|---|"]
        for row in report.timing:
            times = [
                " / ".join(milliseconds(value) for value in (latency.p20, latency.p50, latency.p80))
                for latency in (row.dense, row.converted)
            ]
            outcome = f"{row.ratio:.2f} | {row.verdict} | {row.dense.samples}"
            lines.append(f"| {describe_call(row)} | {times[0]} | {times[1]} | {outcome} |")
    return "\n".join(lines)
