"""The report in a few figures and sentences, the same in the terminal, on the page and in the model card.

The figures say what a reader asks first: how much smaller, how much faster, how much worse, and whether another method
would have been better. Each names what it was measured on; none of them is rounded in our favour.
"""

from dataclasses import dataclass
from typing import Literal

from spmconvert.recipe.recipe import Fit
from spmconvert.reporting.schema import FinetuneRecord, MethodResult, Metric, Report, TimingRow
from spmconvert.units import count, measured, milliseconds, size

Tone = Literal["good", "bad", "plain"]
HEADLINE_TOKENS = 128


@dataclass(frozen=True)
class KeyFigure:
    """One figure of the headline.

    Attributes:
        label: what it is.
        value: the figure.
        detail: on what it was measured.
        tone: whether it speaks for or against the conversion.
    """

    label: str
    value: str
    detail: str
    tone: Tone


def key_figures(report: Report) -> list[KeyFigure]:
    """Size, speed, quality, and the comparison with the simpler method."""
    return [*outcome(report), _baseline_figure(report)]


def outcome(report: Report) -> list[KeyFigure]:
    """The first three of them, about the whole model itself."""
    return [_size_figure(report), _speed_figure(report), _quality_figure(report)]


def findings(report: Report) -> list[str]:
    """What the numbers say, in sentences; losses as plainly as gains."""
    said = []
    if report.timing:
        said.append(f"Forward pass on {report.machine.device}: {break_even(report.timing)}.")
    machine = report.machine
    if report.timing and machine.load is not None and machine.load > machine.cores:
        said.append(
            f"The machine was busy (load {machine.load} on {machine.cores} cores): times are disturbed, though for both "
            "models alike."
        )
    slower = [row for row in report.timing if row.verdict == "slower"]
    if slower:
        sizes = ", ".join(describe_call(row) for row in slower)
        said.append(f"The converted model is slower than the dense one for {sizes}.")
    said.append(_layer_sentence(report))
    said += _candidate_sentences(report.candidates)
    said += _training_sentences(report.training)
    said += [
        f"Not measured: {missing.what}. {missing.reason[:1].upper()}{missing.reason[1:]}."
        for missing in report.not_measured
    ]
    return said


def headline_metric(report: Report) -> Metric | None:
    """The measure of quality that a reader asks for first, or None where none was measured."""
    if not report.quality:
        return None
    metrics = report.quality[0].metrics
    return next((metric for metric in metrics if metric.key == "perplexity"), metrics[0])


def compared_methods(report: Report) -> list[tuple[MethodResult, MethodResult, list[str]]]:
    """The converted model beside each other method that made the model smaller, with the outcome of every measure."""
    own = next((candidate for candidate in report.candidates if candidate.key == "spm"), None)
    if own is None or not own.metrics:
        return []
    others = [candidate for candidate in report.candidates if candidate.key not in ("spm", "dense")]
    return [(own, other, [outcome for _, _, outcome in _compared(own, other)]) for other in others]


def headline_row(report: Report) -> TimingRow | None:
    """The forward pass that a reader asks for first: of so many tokens, or of one picture or sound; None without any."""
    forward = [row for row in report.timing if row.what == "forward"]
    return next((row for row in forward if row.tokens == HEADLINE_TOKENS), forward[0] if forward else None)


def break_even(rows: tuple[TimingRow, ...]) -> str:
    """From how many tokens on the converted model is faster, in words; only clear differences count as faster."""
    forward = [row for row in rows if row.what == "forward"]
    faster = [row.verdict == "faster" for row in forward]
    if not any(faster):
        return f"not faster at any measured size up to {forward[-1].tokens} tokens"
    if all(faster):
        return f"faster at every measured size, from {forward[0].tokens} token on"
    if not faster[-1]:
        sizes = ", ".join(str(row.tokens) for row, won in zip(forward, faster, strict=True) if won)
        return f"faster only at {sizes} tokens, not at {forward[-1].tokens}"
    last = max(index for index, won in enumerate(faster) if not won)
    return f"break-even between {forward[last].tokens} and {forward[last + 1].tokens} tokens"


def describe_call(row: TimingRow) -> str:
    """The size of a timed call in words."""
    tokens = f"{row.tokens} token{'s' if row.tokens != 1 else ''}"
    return tokens if row.what == "forward" else f"generating {tokens}"


def describe_error(metric: Metric) -> str:
    """A metric's standard error and samples in words."""
    spread = "" if metric.standard_error is None else f"± {metric.standard_error:.2g}, "
    return f"{spread}{metric.samples:,} {metric.sample}"


def _size_figure(report: Report) -> KeyFigure:
    whole = report.quantity("parameters", "whole model")
    layers = report.quantity("parameters", "replaced layers")
    disk = report.quantity("bytes on disk", "whole model")
    change = whole.converted / whole.dense - 1
    return KeyFigure(
        "parameters",
        f"{change:+.0%}".replace("-", "−"),
        f"{count(whole.dense)} to {count(whole.converted)}; {size(disk.dense)} to {size(disk.converted)} on disk; "
        f"replaced layers keep {layers.converted / layers.dense:.1%}",
        "good" if change < 0 else "bad",
    )


def _speed_figure(report: Report) -> KeyFigure:
    row = headline_row(report)
    if row is None:
        return KeyFigure("speed", "not measured", "see below", "plain")
    times = f"{milliseconds(row.dense.p50)} to {milliseconds(row.converted.p50)} ms for {row.tokens} tokens"
    tone: Tone = "plain"
    if row.verdict != "no clear difference":
        tone = "good" if row.verdict == "faster" else "bad"
    return KeyFigure("speed", f"{row.ratio:.2f}×", f"{times}, {row.verdict}; {report.machine.device}, median", tone)


def _quality_figure(report: Report) -> KeyFigure:
    if not report.quality:
        return KeyFigure("quality", "not measured", "see below for what is missing", "plain")
    text, metric = report.quality[0], headline_metric(report)
    assert metric is not None
    value = measured(metric.converted, metric.unit)
    value = value if metric.dense is None else f"{measured(metric.dense, metric.unit)} → {value}"
    return KeyFigure(
        "quality", value, f"{metric.title} against the dense model, on {text.text} ({describe_error(metric)})", "plain"
    )


def _baseline_figure(report: Report) -> KeyFigure:
    by_key = {candidate.key: candidate for candidate in report.candidates}
    if by_key and by_key["spm"].metrics:
        compared = _compared(by_key["spm"], by_key["svd"])
        # a few texts may leave the first metric open where another one is clear
        spm_metric, other, outcome = next((comparison for comparison in compared if comparison[2] != "level"), compared[0])
        values = f"{measured(spm_metric.converted, spm_metric.unit)} against {measured(other.converted, other.unit)}"
        return KeyFigure(
            "against SVD of equal size",
            outcome,
            f"{values}: {spm_metric.title}, on {report.quality[0].text}; SPM is {by_key['spm'].note}",
            {"better": "good", "worse": "bad"}.get(outcome, "plain"),  # type: ignore[arg-type]
        )
    won, aims = sum(layer.error < layer.baseline_error for layer in report.layers), _aims(report)
    tone: Tone = "good" if 2 * won > len(report.layers) else "bad"
    return KeyFigure(
        "against SVD of equal size",
        f"{won} of {len(report.layers)}",
        f"layers where SPM has the lower held-out error, before any finetuning{f'; {aims}' if aims else ''}",
        "plain" if aims else tone,
    )


def _training_sentences(training: tuple[FinetuneRecord, ...]) -> list[str]:
    """One sentence a finetune: losses of two are not comparable where their texts, splits or objectives differ."""
    if not training:
        return ["The checkpoint has not been finetuned."]
    said = []
    for run in training:
        if run.best_loss < run.start_loss:
            loss = f"the held-out {run.objective} loss from {run.start_loss:.4g} to {run.best_loss:.4g}"
            said.append(f"Finetuning for {run.steps} steps lowered {loss}.")
        else:
            start = f"the held-out {run.objective} loss of {run.start_loss:.4g}"
            said.append(f"Finetuning for {run.steps} steps did not lower {start}; its start was kept.")
    return said


def _layer_sentence(report: Report) -> str:
    won = sum(layer.error < layer.baseline_error for layer in report.layers)
    aims = _aims(report)
    return (
        f"Layer by layer, before any finetuning, SPM has a lower error than whitened SVD of equal size on {won} of "
        f"{len(report.layers)} layers{f'; {aims}' if aims else ''}."
    )


def _aims(report: Report) -> str:
    return Fit.model_validate(report.model.recipe["fit"]).fit_note


def _candidate_sentences(candidates: tuple[MethodResult, ...]) -> list[str]:
    spm = next((candidate for candidate in candidates if candidate.key == "spm"), None)
    if spm is None or not spm.metrics:
        return []
    said = []
    for other in candidates:
        if other.key in ("spm", "dense"):
            continue
        outcomes = (
            f"{outcome} by {mine.title} ({measured(mine.converted, mine.unit)} against {measured(its.converted, its.unit)})"
            for mine, its, outcome in _compared(spm, other)
        )
        said.append(
            f"Whole model, SPM compared with {other.described}: {', '.join(outcomes)}, with "
            f"{_relative_size(spm, other)}{_relative_time(spm, other)}; SPM is {spm.note}."
        )
    return said


def _relative_size(spm: MethodResult, other: MethodResult) -> str:
    if other.is_int8 and spm.bytes and other.bytes:
        return f"{spm.bytes / other.bytes:.2f} times its bytes"
    return f"{spm.parameters / other.parameters:.2f} times its parameters"


def _relative_time(spm: MethodResult, other: MethodResult) -> str:
    if spm.latency is None or other.latency is None:
        return ""
    return f" and {spm.latency.p50 / other.latency.p50:.2f} times its time for {spm.tokens} tokens"


def _compared(candidate: MethodResult, other: MethodResult) -> list[tuple[Metric, Metric, str]]:
    """The metrics of two candidates, one beside the other, and what they say of the first."""
    pairs = zip(candidate.metrics, other.metrics, strict=True)
    return [(mine, its, _outcome(mine, its)) for mine, its in pairs]


def _outcome(metric: Metric, other: Metric) -> str:
    """``better``, ``worse``, or ``level`` where the difference is within two standard errors."""
    gain = metric.converted - other.converted if metric.higher_is_better else other.converted - metric.converted
    if metric.standard_error is not None and other.standard_error is not None:
        noise = 2 * (metric.standard_error**2 + other.standard_error**2) ** 0.5
        if abs(gain) <= noise:
            return "level"
    return "better" if gain > 0 else "worse"
