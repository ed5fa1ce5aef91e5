"""The first line of a report: whether the converted model is worth it, for whom, and what would be better.

It goes by three things that were measured: whether the model is faster, how much smaller it is, and how close to the dense
one. What counts as close is a convention, written down here; whoever has a task of their own has a better one.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spmconvert.data.standin import is_stand_in
from spmconvert.reporting.schema import MethodResult, Metric, Report, TimingRow
from spmconvert.reporting.summary import compared_methods, headline_metric, headline_row
from spmconvert.units import measured

Tone = Literal["good", "bad", "plain"]
# nats a token above the dense model or apart from it, up to which a language model is close, and from which it is far
CLOSE_NATS, FAR_NATS = 0.25, 1.0
# the same for agreement, similarity and correlation with the dense model, which is 1 there
CLOSE_SHARE, FAR_SHARE = 0.95, 0.85
# a smaller saving than this is hardly one, and int8 weights take about this share of a float32 model's bytes
LEAST_SAVING, INT8_SHARE = 0.05, 0.3
# up to how many times the bytes count as the same size
SAME_SIZE = 1.02


@dataclass(frozen=True)
class Verdict:
    """One line.

    Attributes:
        text: what it says.
        tone: whether it speaks for or against the conversion.
    """

    text: str
    tone: Tone


def verdict(report: Report) -> Verdict:
    """The verdict of a report."""
    gains = _gains(report)
    metric = headline_metric(report)
    if metric is None:
        return Verdict(f"No verdict: quality was not measured ({gains}).", "plain")
    distance = _distance(metric)
    quality = f"{metric.title} {_values(metric)}"
    if distance == "far":
        return Verdict(f"Not worth it as it is: far from the dense model ({quality}; {gains}). {_remedy(report)}", "bad")
    if report.timing and not _is_faster(report) and _saved(report) < LEAST_SAVING:
        return Verdict(
            f"Not worth it: neither faster nor smaller to speak of ({gains}; {quality}). Target more layers, or ask for "
            "more with --speedup or --keep.",
            "bad",
        )
    better = _better_method(report)
    if better:
        return Verdict(f"{better} ({gains}; {quality}).", "bad")
    if not report.timing:
        return Verdict(f"No verdict: speed was not measured ({gains}; {quality}).", "plain")
    if not _is_faster(report):
        return Verdict(
            f"Worth it where size counts, not for speed: {gains}; {quality}. {_smaller(report)}{_int8(report)}"
            "For speed convert with --speedup.",
            "plain",
        )
    if distance == "close":
        close = f"Worth it where it runs as here: {gains}, and close to the dense model ({quality}). {_int8(report)}"
        return Verdict(close.rstrip(), "good")
    given = f"Worth it where some quality can be given: {gains}; {quality}. {_int8(report)}{_remedy(report)}"
    return Verdict(given, "plain")


def _gains(report: Report) -> str:
    row = headline_row(report)
    disk = report.quantity("bytes on disk", "whole model")
    bytes_left = f"{1 - disk.converted / disk.dense:.0%} fewer bytes" if disk.converted < disk.dense else "no fewer bytes"
    if row is None:
        return f"{bytes_left}, speed not measured"
    speed = f"{row.ratio:.2f} times as fast at {row.tokens} tokens"
    noise = ", which is within the noise" if row.verdict == "no clear difference" else ""
    fastest = max(_faster_rows(report), key=lambda other: other.ratio, default=row)
    elsewhere = f", {fastest.ratio:.2f} times at {fastest.tokens}" if row.verdict != "faster" and fastest is not row else ""
    return f"{speed}{noise}{elsewhere}, {bytes_left}"


def _is_faster(report: Report) -> bool:
    return bool(_faster_rows(report))


def _faster_rows(report: Report) -> list[TimingRow]:
    return [row for row in report.timing if row.what == "forward" and row.verdict == "faster"]


def _saved(report: Report) -> float:
    disk = report.quantity("bytes on disk", "whole model")
    return 1 - disk.converted / disk.dense


def _distance(metric: Metric) -> Literal["close", "between", "far"]:
    # what is no number is far
    if metric.key == "perplexity" and metric.dense:
        return _by_nats(math.log(metric.converted / metric.dense))
    if metric.unit == "nats":
        return _by_nats(metric.converted)
    share = metric.converted if metric.higher_is_better else 1 - metric.converted
    return "close" if share >= CLOSE_SHARE else "between" if share >= FAR_SHARE else "far"


def _by_nats(nats: float) -> Literal["close", "between", "far"]:
    return "close" if nats <= CLOSE_NATS else "between" if nats <= FAR_NATS else "far"


def _values(metric: Metric) -> str:
    converted = measured(metric.converted, metric.unit)
    return converted if metric.dense is None else f"{measured(metric.dense, metric.unit)} -> {converted}"


def _remedy(report: Report) -> str:
    stands_in = "" if _has_own_text(report) else ", and calibrate on a text like what it is used for (--calib)"
    budget = "a larger budget (a lower --speedup, a higher --keep)"
    if report.training:
        return f"Convert again with {budget}{stands_in}."
    return f"Finetune it, or convert again with {budget}{stands_in}."


def _has_own_text(report: Report) -> bool:
    recorded = report.model.recipe["calibration"].get("file")
    return bool(recorded) and not is_stand_in(Path(recorded))


def _smaller(report: Report) -> str:
    disk = report.quantity("bytes on disk", "whole model")
    measured_here = any(candidate.is_int8 for candidate in report.candidates)
    if disk.converted / disk.dense <= INT8_SHARE or report.model.dtype != "float32" or measured_here:
        return ""
    return "Weights in int8 take about a quarter of its bytes; they were not measured here. "


def _int8(report: Report) -> str:
    """What is said where int8 of the untouched model takes fewer bytes and is no farther from it; of two the faster one."""
    rivals = [
        (mine, other, outcomes[0])
        for mine, other, outcomes in compared_methods(report)
        if other.is_int8 and outcomes[0] != "better" and _relative_bytes(mine, other) < 1
    ]
    if not rivals:
        return ""
    mine, other, outcome = min(rivals, key=lambda rival: rival[1].latency.p50 if rival[1].latency else 0.0)
    time = ""
    if mine.latency is not None and other.latency is not None:
        time = f", {other.latency.p50 / mine.latency.p50:.2f} times the time"
    closer = "closer" if outcome == "worse" else "as close"
    return f"{other.described}: {_relative_bytes(mine, other):.2f} times the bytes, {closer} to the dense model{time}. "


def _relative_bytes(mine: MethodResult, other: MethodResult) -> float:
    """Size of another method relative to ours; by parameters where a report has no bytes."""
    return other.bytes / mine.bytes if mine.bytes and other.bytes else other.parameters / mine.parameters


def _better_method(report: Report) -> str:
    """What is said where another method that was measured is better in quality, and no slower."""
    for mine, other, outcomes in compared_methods(report):
        # slower is what no part of the noise explains
        no_slower = mine.latency is None or other.latency is None or other.latency.p20 <= mine.latency.p80
        size = _relative_bytes(mine, other)
        if no_slower and size <= SAME_SIZE and outcomes[0] == "worse":
            smaller = "smaller" if size < 1 / SAME_SIZE else "of the same size"
            return f"{other.described}: better, {smaller} and no slower"
    return ""
