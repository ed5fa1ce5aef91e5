"""The report on a converted checkpoint: what it saves, what it costs, and whether it was the right choice.

Read top to bottom: ``report`` is the whole of it. Sizes and layer errors come from the checkpoint's own files; quality,
time and memory are measured anew, dense and converted in the same run. A part whose input is missing is listed with the
remedy and never estimated.
"""

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from spmconvert.checkpoint.converted import Converted, open_converted
from spmconvert.data.rows import Row, row_batch
from spmconvert.data.standin import stand_in
from spmconvert.data.tokens import inputs_of, load_tokenizer
from spmconvert.errors import CalibrationError, CheckpointError, OptionError
from spmconvert.model.architecture import load_config, runs_on
from spmconvert.operator.int8 import check_torchao
from spmconvert.outputs.probe import text_config
from spmconvert.recipe.loading import recorded_recipe
from spmconvert.recipe.recipe import AUTO_TEXT, DATASET_PREFIX
from spmconvert.reporting import timing
from spmconvert.reporting.harness import check_harness, run_tasks
from spmconvert.reporting.measure import compare
from spmconvert.reporting.methods import measure_candidates
from spmconvert.reporting.models import ReportRun
from spmconvert.reporting.recorded import record_output
from spmconvert.reporting.rows import Domain, EvaluationRows, evaluation_rows
from spmconvert.reporting.schema import (
    SCHEMA_VERSION,
    FinetuneRecord,
    Generation,
    Machine,
    MethodResult,
    Model,
    NotMeasured,
    Quality,
    Quantity,
    Report,
    Task,
    TimingRow,
    TrainingPoint,
)
from spmconvert.reporting.sizes import quantities, replaced_layers
from spmconvert.system.devices import check_device
from spmconvert.version import __version__

GENERATIONS = 3
PROMPT_TOKENS = 24
CONTINUATION_TOKENS = 40
DATA_REMEDY = "name data that was neither fitted nor trained on with --data"


@dataclass(frozen=True)
class ReportOptions:
    """What a report measures beside quality, how long it may take, and where things are.

    Attributes:
        teacher: another place of the source checkpoint; None for the recorded one.
        calibration: another place of the calibration text, for the baselines; None for the recorded one.
        baselines: measure whitened SVD and 2:4 beside it, refined as the conversion was, and int8 of the untouched model.
        quick: leave the refinement of the baselines out.
        int8: whether int8 is among the baselines; None where torchao is installed.
        tasks: names of lm-evaluation-harness tasks.
        rows: most rows of a text that are measured.
        seconds: about how long one timing may take; 0 measures neither time nor memory.
        device: where the models run.
        brief: sizes, quality and the time of one pass alone.

    Raises:
        OptionError: when a number is outside its range.
    """

    teacher: str | None = None
    calibration: str | Path | None = None
    baselines: bool = False
    quick: bool = False
    int8: bool | None = None
    tasks: tuple[str, ...] = ()
    rows: int = 64
    seconds: float = 2.0
    device: str = "cpu"
    brief: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.rows < 1:
            raise OptionError(f"rows is {self.rows}; give a number from 1 on")
        if not 0 <= self.seconds < math.inf:
            raise OptionError(f"seconds is {self.seconds}; give a number from 0 on")
        named = self.calibration is not None and not str(self.calibration).startswith(DATASET_PREFIX)
        if named and not Path(str(self.calibration)).exists():
            raise CalibrationError(f"there is no calibration text {self.calibration}; check the path")
        if self.quick and not self.baselines:
            raise OptionError("quick leaves the refinement of baselines out, and none are measured; add --baselines")
        if self.int8 is not None and not self.baselines:
            raise OptionError("int8 is one of the baselines, and none are measured; add --baselines")
        if self.int8:
            check_torchao()


def report(
    directory: str | Path,
    *,
    data: str | Path | None = None,
    other_data: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Measure a converted checkpoint against its source.

    Args:
        directory: output of a conversion or of a finetune.
        data: text to measure quality on, .txt or .jsonl, or a folder or file of pictures or sounds; neither fitted nor
            trained on. ``auto`` for prose that every Python installation has, or made-up pictures or sounds.
        other_data: a second text, of another domain.
        progress: told what is being done.
        **options: fields of ``ReportOptions``.

    Raises:
        SpmconvertError: see ``spmconvert.errors`` for the kinds.
    """
    chosen = ReportOptions(**options)
    check_device(chosen.device)
    if chosen.tasks:
        check_harness()
    converted = open_converted(Path(directory))
    config = load_config(converted.directory)
    progress("loading")
    machine = describe_machine(chosen.device)
    run = ReportRun(converted, config, chosen.device, chosen.seconds, progress)
    training = _training(run)
    run.open_dense(chosen.teacher)
    texts = _texts(run, data, other_data, chosen.rows)
    layers = replaced_layers(converted, config)
    amounts = [*quantities(converted, run.source, config, layers), *([] if chosen.brief else _memory(run))]
    quality = _quality(run, texts)
    methods: tuple[MethodResult, ...] = ()
    if chosen.baselines:
        methods = measure_candidates(
            run, layers, amounts, texts, quality, chosen.calibration, quick=chosen.quick, int8=chosen.int8
        )
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        model=_describe_model(run),
        layers=layers,
        layer_errors_on=_layer_errors_on(converted),
        quantities=tuple(amounts),
        training=training,
        quality=quality,
        generations=() if chosen.brief else _generations(run, texts),
        timing=_timing(run, texts, brief=chosen.brief),
        candidates=methods,
        tasks=_tasks(run, chosen.tasks),
        recorded_output=record_output(run.student) if run.reads_tokens and not chosen.brief else None,
        # last: every part above may have added to it
        not_measured=tuple(run.not_measured),
    )


def describe_machine(device: str) -> Machine:
    """Where the measurements are made."""
    import transformers

    cuda = device.startswith("cuda")
    return Machine(
        device=device,
        processor=torch.cuda.get_device_name(device) if cuda else _processor(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "python": platform.python_version(),
            "spmconvert": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _describe_model(run: ReportRun) -> Model:
    provenance = run.converted.provenance
    calibration = provenance["calibration"]
    if calibration is not None:
        calibration = {**calibration, "file": Path(provenance["recipe"]["calibration"]["file"]).name}
    return Model(
        name=run.converted.directory.resolve().name,
        architecture=type(run.student).__name__,
        weights_sha256=run.converted.checkpoint().sha256(),
        source=provenance["source"]["name"],
        source_revision=provenance["source"]["revision"],
        source_sha256=provenance["source"]["sha256"],
        source_reachable=run.source is not None,
        dtype=str(run.student.dtype).removeprefix("torch."),
        converted_with=provenance["spmconvert_version"],
        recipe=provenance["recipe"],
        calibration=calibration,
        finetuned=bool(provenance.get("finetune")),
    )


def _layer_errors_on(converted: Converted) -> str:
    calibration = converted.provenance["calibration"]
    if calibration is None:
        return "relative squared Frobenius error of the weight; the fit used no data"
    held_out, fitted = calibration["held_out_rows"], calibration["fitted_rows"]
    measured = f"{held_out} held-out rows of the calibration text; {fitted} other rows were fitted"
    if calibration["choosing_rows"]:
        measured += f" and {calibration['choosing_rows']} chose the designs"
    aims = recorded_recipe(converted.provenance["recipe"]).fit.fit_note
    return f"{measured}; {aims}" if aims else measured


def _training(run: ReportRun) -> tuple[FinetuneRecord, ...]:
    """The finetunes as they were recorded; a record holds more than the report shows."""
    recorded = run.converted.provenance.get("finetune", [])
    try:
        return tuple(
            FinetuneRecord.model_validate(
                {**_shown(record, FinetuneRecord), "history": [_shown(point, TrainingPoint) for point in record["history"]]}
            )
            for record in recorded
        )
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else "history"
        raise CheckpointError(
            f"{run.converted.directory} has a finetune in its provenance that is not understood at {where!r}; finetune "
            "again with this version"
        ) from None


def _shown(record: dict[str, Any], part: type[BaseModel]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key in part.model_fields}


def _texts(run: ReportRun, data: str | Path | None, other: str | Path | None, count: int) -> list[EvaluationRows]:
    """The unseen rows of the texts that were given; what is missing is noted."""
    called: str | None = None
    if str(data) == AUTO_TEXT:
        found = stand_in("evaluation", run.converted.directory, run.config, run.converted.layers)
        data, called = (None, None) if found is None else (found.file, found.what)
    if data is None:
        run.note_missing("quality", "no text is given", DATA_REMEDY)
    if run.student.__class__.__name__.endswith("ForQuestionAnswering"):
        run.note_missing("quality", "spans of question answering are not compared", "measure the task itself with --tasks")
        return []
    texts = []
    asked: tuple[tuple[str | Path | None, Domain, str | None], ...] = ((data, "first", called), (other, "other", None))
    for file, domain, name in asked:
        if file is None:
            continue
        rows = evaluation_rows(run.converted, run.config, Path(file), domain, count=count, name=name)
        if isinstance(rows, NotMeasured):
            run.not_measured.append(rows)
        elif (refusal := _refusal(run, rows.rows[:1])) is not None:
            run.note_missing(f"quality on {rows.name}", refusal, DATA_REMEDY)
        else:
            texts.append(rows)
    return texts


def _refusal(run: ReportRun, rows: list[Row]) -> str | None:
    """Why the model does not run on rows of a kind; None where it does."""
    batch = row_batch(rows, 0, run.student)
    try:
        with torch.no_grad(), runs_on(run.student, batch):
            run.student(**batch)
    except CalibrationError as error:
        return str(error).partition(";")[0]
    return None


def _quality(run: ReportRun, texts: list[EvaluationRows]) -> tuple[Quality, ...]:
    if run.dense is None:
        return ()
    qualities = []
    for text in texts:
        run.progress(f"measuring quality on {text.name}")
        qualities.append(
            Quality(
                text=text.name,
                domain=text.domain,
                sha256=text.sha256,
                rows_from=text.origin,
                rows=len(text.rows),
                tokens=text.tokens,
                metrics=compare(run.dense, run.student, text),
            )
        )
    return tuple(qualities)


def _generations(run: ReportRun, texts: list[EvaluationRows]) -> tuple[Generation, ...]:
    """Greedy continuations of the beginnings of unseen rows, by models that only generate."""
    if run.dense is None or not texts or not run.dense.can_generate() or run.config.is_encoder_decoder:
        return ()
    run.progress("generating samples")
    tokenizer = load_tokenizer(run.converted.directory)
    positions = getattr(text_config(run.config), "max_position_embeddings", None) or PROMPT_TOKENS + CONTINUATION_TOKENS
    prompt_tokens = min(PROMPT_TOKENS, positions // 2)
    new = min(CONTINUATION_TOKENS, positions - prompt_tokens)
    samples = []
    for row in texts[0].rows[:GENERATIONS]:
        given = _beginning(row, prompt_tokens, run.dense)
        if given is None:
            return ()
        ids = given.pop("input_ids")
        answers = [timing.generate(model, ids, new, **given)[0, ids.shape[1] :] for model in (run.dense, run.student)]
        prompt, dense, converted = (tokenizer.decode(part) for part in (ids[0], *answers))
        samples.append(Generation(prompt=prompt, dense=dense, converted=converted, new_tokens=new))
    return tuple(samples)


def _beginning(row: Row, tokens: int, model: Any) -> dict[str, Any] | None:
    """The beginning of a row as keyword arguments of a model; None where it has no words to begin with."""
    if isinstance(row, torch.Tensor):
        return {"input_ids": row[None, :tokens].to(model.device)}
    if "input_ids" not in row.tensors:
        return None
    # with all of its words: a picture among them has to stay whole
    batch = row_batch([row], 0, model)
    batch.pop("use_cache", None)
    return batch


def _timing(run: ReportRun, texts: list[EvaluationRows], *, brief: bool) -> tuple[TimingRow, ...]:
    if run.dense is None:
        return ()
    if not run.seconds:
        run.note_missing("time and memory", "--seconds is 0", "give --seconds 2 or more")
        return ()
    models = (run.dense, run.student, run.seconds, run.device)
    if not run.reads_tokens:
        if not texts:
            run.note_missing("time", f"the model reads {inputs_of(run.config)}, and there is none", DATA_REMEDY)
            return ()
        run.progress("timing dense and converted in turn")
        return tuple(timing.time_items(*models, texts[0].rows, sizes=timing.ITEMS[:1] if brief else timing.ITEMS))
    run.progress("timing dense and converted in turn")
    if brief:
        return tuple(timing.time_forward(*models, sizes=(timing.TYPICAL_TOKENS,)))
    generation = [timing.time_generation(*models)] if run.dense.can_generate() else []
    return (*timing.time_forward(*models), *generation)


def _memory(run: ReportRun) -> list[Quantity]:
    if run.source is None or not run.reads_tokens or not run.seconds:
        return []
    run.progress("measuring memory in fresh processes")
    peak = timing.peak_memory(run.source.directory, run.converted.directory, run.device)
    if isinstance(peak, NotMeasured):
        run.not_measured.append(peak)
        return []
    return [peak]


def _tasks(run: ReportRun, names: tuple[str, ...]) -> tuple[Task, ...]:
    if not names:
        return ()
    run.progress(f"running {', '.join(names)}")
    return run_tasks(run.student, run.dense, load_tokenizer(run.converted.directory), names)
