"""The converted model among the alternatives: untouched, whitened SVD, 2:4 and int8, measured alike and timed in turn."""

from pathlib import Path
from typing import Any

from spmconvert.data.calibration import CalibrationRows
from spmconvert.errors import OptionError, SpmconvertError
from spmconvert.model.int8 import saved_bytes
from spmconvert.operator.int8 import INSTALL
from spmconvert.operator.terms.sparse24 import Sparse24
from spmconvert.outputs.probe import token_batch
from spmconvert.reporting import timing
from spmconvert.reporting.baselines import INT8, METHODS, build_baselines, build_int8
from spmconvert.reporting.measure import compare
from spmconvert.reporting.models import ReportRun
from spmconvert.reporting.rows import EvaluationRows, recorded_rows
from spmconvert.reporting.schema import Latency, Layer, MethodResult, Metric, NotMeasured, Quality, Quantity


def measure_candidates(
    run: ReportRun,
    layers: tuple[Layer, ...],
    amounts: list[Quantity],
    texts: list[EvaluationRows],
    quality: tuple[Quality, ...],
    calibration: str | Path | None,
    *,
    quick: bool = False,
    int8: bool | None = None,
) -> tuple[MethodResult, ...]:
    """The untouched model, ours, and the other methods, measured the same way and timed in turn.

    Raises:
        OptionError: when int8 is asked for and torchao is missing; it is noted where ``int8`` is None.
    """
    if run.dense is None:
        return ()
    rows = _calibration_rows(run, calibration)
    if isinstance(rows, NotMeasured):
        run.not_measured.append(rows)
        return ()
    run.progress("fitting the baselines")
    recipe = run.converted.provenance["recipe"]
    epochs = recipe["fit"].get("refine") or 0
    others = build_baselines(run.dense, run.converted.layers, rows, epochs=0 if quick else epochs, seed=recipe["seed"])
    refined = "not refined (--quick), " if quick and epochs else "refined alike, " if epochs else ""
    models = {"dense": run.dense, "spm": run.student, **{method: model for method, (model, _) in others.items()}}
    models |= _in_int8(run, int8)
    latency = _time_candidates(run, models)
    whole = next(amount for amount in amounts if (amount.what, amount.scope) == ("parameters", "whole model"))
    replaced = sum(layer.dense_parameters for layer in layers)
    in_layers = {"dense": replaced, "spm": sum(layer.parameters for layer in layers)}
    in_layers |= {method: parameters for method, (_, parameters) in others.items()}
    in_layers |= {key: replaced for key in models if key in INT8}
    sizes = _bytes(run, models, layers, amounts, in_layers)
    candidates = []
    for key, model in models.items():
        metrics: tuple[Metric, ...] = quality[0].metrics if key == "spm" and quality else ()
        if texts and key != "spm":
            run.progress(f"measuring {TITLES[key]} on {texts[0].name}")
            metrics = compare(run.dense, model, texts[0])
        candidates.append(
            MethodResult(
                key=key,
                title=TITLES[key],
                parameters=whole.dense - replaced + in_layers[key],
                layer_parameters=in_layers[key],
                bytes=sizes[key],
                note=_note(key, bool(run.converted.provenance.get("finetune")), refined),
                metrics=metrics,
                latency=latency.get(key),
                tokens=timing.TYPICAL_TOKENS,
            )
        )
    return tuple(candidates)


TITLES = {"dense": "untouched", "spm": "SPM (this checkpoint)", **METHODS, **INT8}


def _in_int8(run: ReportRun, wanted: bool | None) -> dict[str, Any]:
    if wanted is False:
        return {}
    try:
        return build_int8(run.dense)
    except OptionError as error:
        if wanted:
            raise
        run.note_missing(f"{' and '.join(INT8.values())} of the untouched model", str(error), INSTALL)
        return {}


def _bytes(
    run: ReportRun, models: dict[str, Any], layers: tuple[Layer, ...], amounts: list[Quantity], in_layers: dict[str, int]
) -> dict[str, int]:
    """Bytes that each model's tensors take in a file, from those of the untouched one."""
    disk = next(amount for amount in amounts if amount.what == "bytes on disk")
    found = {"dense": disk.dense, "spm": disk.converted}
    for key in METHODS:
        found[key] = disk.dense + run.dense.dtype.itemsize * (in_layers[key] - in_layers["dense"])
    found["2:4"] += sum(Sparse24(layer.in_features, layer.out_features).index_bytes() for layer in layers)
    return found | {key: disk.dense - saved_bytes(model) for key, model in models.items() if key in INT8}


def _note(key: str, finetuned: bool, refined: str) -> str:
    notes = {
        "dense": "what the others are compared with",
        "spm": "finetuned; the other methods are not" if finetuned else "not finetuned",
        "svd": f"two thin products, {refined}not finetuned",
        "2:4": f"stored with 2 bits of position a weight; timed as a dense product; {refined}not finetuned",
        "int8-weight-only": "of the untouched model by torchao, without heads and embeddings",
        "int8-dynamic": "of the untouched model by torchao, without heads and embeddings; activations of every token, too",
    }
    return notes[key]


def _time_candidates(run: ReportRun, models: dict[str, Any]) -> dict[str, Latency]:
    if not run.seconds or not run.reads_tokens:
        return {}
    run.progress("timing the methods in turn")
    batch = token_batch(run.dense, timing.TYPICAL_TOKENS)
    calls = {key: timing.forward_call(model, batch) for key, model in models.items()}
    return timing.interleaved(calls, 2 * run.seconds, run.device)


def _calibration_rows(run: ReportRun, calibration: str | Path | None) -> CalibrationRows | NotMeasured | None:
    """The rows that the conversion fitted, None where it used none, or why they cannot be had."""
    recorded = run.converted.provenance["calibration"]
    if recorded is None:
        return None
    file = Path(calibration or run.converted.provenance["recipe"]["calibration"]["file"])
    try:
        rows = recorded_rows(run.converted, run.config, file)
        reason = "" if rows is not None else f"{file} is not the calibration text (other hash or rows)"
    except SpmconvertError as error:
        reason = str(error)
    if reason:
        remedy = "name the calibration text with --calib"
        return NotMeasured(what="baselines", reason=f"they need the same calibration rows: {reason}", remedy=remedy)
    return rows
