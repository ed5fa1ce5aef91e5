"""The first line of a report: what it says of every kind of outcome."""

import math

import pytest

from spmconvert.reporting.schema import Latency, TimingRow
from spmconvert.reporting.verdict import CLOSE_NATS, FAR_NATS, verdict

pytestmark = pytest.mark.xdist_group("report")


def timed(ratio, outcome, tokens=128):
    spread = 0.5 if outcome == "no clear difference" else 0.01
    dense, converted = (
        Latency(p20=(1 - spread) * p50, p50=p50, p80=(1 + spread) * p50, samples=9) for p50 in (10.0, 10.0 / ratio)
    )
    row = TimingRow(what="forward", tokens=tokens, shape=f"1 x {tokens}", dense=dense, converted=converted)
    assert row.verdict == outcome
    return row


def changed(report, nats=None, *, speed=(1.3, "faster"), saved=0.2, training=()):
    """A report with another loss, another speed and another size."""
    quality = ()
    if nats is not None:
        (text, *_) = report.quality
        metric = next(metric for metric in text.metrics if metric.key == "perplexity")
        metric = metric.model_copy(update={"dense": 10.0, "converted": 10.0 * math.exp(nats)})
        quality = (text.model_copy(update={"metrics": (metric,)}),)
    quantities = tuple(
        quantity.model_copy(update={"dense": 1000, "converted": round(1000 * (1 - saved))})
        if quantity.what == "bytes on disk"
        else quantity
        for quantity in report.quantities
    )
    return report.model_copy(
        update={
            "quality": quality,
            "timing": (timed(*speed),),
            "quantities": quantities,
            "candidates": (),
            "training": training,
        }
    )


def test_close_and_faster_is_worth_it(quick_report):
    found = verdict(changed(quick_report, CLOSE_NATS))
    assert found.tone == "good"
    gains = "1.30 times as fast at 128 tokens, 20% fewer bytes"
    assert found.text.startswith(f"Worth it where it runs as here: {gains}, and close to the dense model (perplexity 10")


def test_far_is_not_and_the_remedy_follows_what_was_done(quick_report):
    found = verdict(changed(quick_report, FAR_NATS + 0.1))
    assert found.tone == "bad"
    assert "Not worth it as it is: far from the dense model (perplexity 10 -> 30" in found.text
    assert "Finetune it, or convert again with a larger budget" in found.text
    finetuned = changed(quick_report, FAR_NATS + 0.1, training=(object(),))
    assert "Finetune it" not in verdict(finetuned).text
    assert "Convert again with a larger budget" in verdict(finetuned).text


def test_between_says_what_is_given(quick_report):
    found = verdict(changed(quick_report, (CLOSE_NATS + FAR_NATS) / 2))
    assert found.tone == "plain"
    assert found.text.startswith("Worth it where some quality can be given")


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        (CLOSE_NATS, "and close to the dense model (KL divergence a token 0.25 nats)"),
        (FAR_NATS, "Worth it where some quality can be given"),
        (FAR_NATS + 0.1, "Not worth it as it is: far"),
        (math.nan, "Not worth it as it is: far"),
    ],
)
def test_a_divergence_counts_in_nats(quick_report, nats, said):
    report = changed(quick_report, 0.1)
    text = quick_report.quality[0]
    metric = next(metric for metric in text.metrics if metric.key == "kl").model_copy(update={"converted": nats})
    report = report.model_copy(update={"quality": (text.model_copy(update={"metrics": (metric,)}),)})
    assert said in verdict(report).text


def test_a_loss_that_is_no_number_is_far(quick_report):
    assert verdict(changed(quick_report, math.nan)).text.startswith("Not worth it as it is: far")


def test_where_it_is_faster_is_said(quick_report):
    report = changed(quick_report, 0.1)
    rows = (timed(0.8, "slower"), timed(1.2, "faster", 512), timed(1.4, "faster", 1024))
    found = verdict(report.model_copy(update={"timing": rows})).text
    assert "where it runs as here: 0.80 times as fast at 128 tokens, 1.40 times at 1024, 20% fewer bytes" in found


def test_what_stands_in_is_no_text_of_ones_own(quick_report, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "link"))

    def hint(file):
        recipe = {**quick_report.model.recipe, "calibration": {"file": str(file)}}
        model = quick_report.model.model_copy(update={"recipe": recipe})
        return "--calib" in verdict(changed(quick_report.model_copy(update={"model": model}), FAR_NATS + 1)).text

    assert hint(tmp_path / "real" / "texts" / "calibration-1.txt")
    assert hint(tmp_path / "real" / "inputs" / "made-up-pictures-calibration-1.safetensors")
    assert not hint(tmp_path / "real" / "inputs" / "holiday-1.safetensors")
    assert not hint(tmp_path / "own.txt")


def test_smaller_alone_is_for_size(quick_report):
    found = verdict(changed(quick_report, 0.1, speed=(1.0, "no clear difference")))
    assert (
        "Worth it where size counts, not for speed: 1.00 times as fast at 128 tokens, which is within the noise, 20%"
        in found.text
    )
    assert "Weights in int8 take about a quarter of its bytes" in found.text
    small = verdict(changed(quick_report, 0.1, speed=(0.8, "slower"), saved=0.8))
    assert "0.80 times as fast at" in small.text
    assert "int8" not in small.text


def test_neither_faster_nor_smaller_is_not_worth_it(quick_report):
    found = verdict(changed(quick_report, 0.0, speed=(1.0, "no clear difference"), saved=0.01))
    assert found.tone == "bad"
    assert "neither faster nor smaller" in found.text


def test_there_is_none_without_quality(quick_report):
    found = verdict(changed(quick_report))
    assert found.text == "No verdict: quality was not measured (1.30 times as fast at 128 tokens, 20% fewer bytes)."
    assert found.tone == "plain"


def test_there_is_none_without_times(quick_report):
    untimed = changed(quick_report, 0.1, saved=0.01).model_copy(update={"timing": ()})
    found = verdict(untimed)
    assert found.text.startswith("No verdict: speed was not measured (1% fewer bytes, speed not measured; perplexity 10")
    assert found.tone == "plain"


def rivals(report, quality, *, size, time):
    """A report with int8 dynamic beside the converted model: relative size and time, and the perplexity it has."""
    spm, int8 = (next(one for one in report.candidates if one.key == key) for key in ("spm", "int8-dynamic"))
    changed_report = changed(report, 0.1)
    (metric,) = changed_report.quality[0].metrics
    metric = metric.model_copy(update={"standard_error": None})
    own, latency = (Latency(p20=0.99 * p50, p50=p50, p80=1.01 * p50, samples=9) for p50 in (1.0, time))
    spm = spm.model_copy(update={"metrics": (metric,), "bytes": 1000, "latency": own})
    its = {"metrics": (metric.model_copy(update={"converted": quality}),), "bytes": round(1000 * size), "latency": latency}
    return changed_report.model_copy(update={"candidates": (spm, int8.model_copy(update=its))})


def test_int8_that_is_better_in_everything_is_the_verdict(quick_report):
    found = verdict(rivals(quick_report, 10.01, size=0.6, time=0.9))
    assert found.tone == "bad"
    assert found.text.startswith("int8 dynamic of the untouched model: better, smaller and no slower (1.30 times as fast")
    assert "of the same size" in verdict(rivals(quick_report, 10.01, size=1.0, time=0.9)).text


@pytest.mark.parametrize(
    ("quality", "size", "time", "said"),
    [
        (
            10.01,
            0.6,
            1.4,
            "int8 dynamic of the untouched model: 0.60 times the bytes, closer to the dense model, 1.40 times",
        ),
        (99.0, 0.6, 0.5, None),
        (10.01, 1.5, 1.4, None),
    ],
    ids=["slower", "farther", "larger"],
)
def test_int8_that_is_better_in_part_is_said(quick_report, quality, size, time, said):
    found = verdict(rivals(quick_report, quality, size=size, time=time))
    assert found.tone == "good"
    assert said in found.text if said else "int8" not in found.text


def test_what_int8_would_take_is_no_guess_where_it_was_measured(quick_report):
    measured = rivals(quick_report, 99.0, size=0.6, time=1.4)
    slow = changed(quick_report, 0.1, speed=(1.0, "no clear difference")).model_copy(
        update={"candidates": measured.candidates}
    )
    assert "about a quarter" not in verdict(slow).text
