"""Recovering quality: a converted checkpoint is distilled against the dense one it came from.

Read top to bottom: ``finetune`` is the whole of it. The teacher is the recorded source, checked by its hash; the student
is trained in float32 and written in the dtypes it came in, every tensor that was not trained byte for byte. The result
appears by one rename, also in place of the input, and until then the run lives in the working directory of the output, from
where it can be resumed. With several processes all of them train and the first one writes.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.card import finetuned_card
from spmconvert.checkpoint.converted import FINETUNED_SUFFIX, Converted, open_converted, open_source
from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.checkpoint.manifest import PROVENANCE_FILE
from spmconvert.checkpoint.places import STATE_FILE, check_apart, finish_commit
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.data.training import TrainingData, load_training_data
from spmconvert.distill.distributed import make_accelerator, prepare_student, settled_precision, share_snapshot
from spmconvert.distill.guide import Guide
from spmconvert.distill.length import settled_rate, settled_rows, settled_scope
from spmconvert.distill.loop import TrainingRun, held_out_losses, match_layers, train
from spmconvert.distill.loss import Distillation
from spmconvert.distill.models import load_student, load_teacher
from spmconvert.distill.parameters import choose_trained, converted_layers, state_bytes, structured_parameters
from spmconvert.distill.runlog import RunLog, check_log
from spmconvert.distill.state import State, restore, whole
from spmconvert.distill.stored import StoredLogits, store_logits
from spmconvert.errors import FitError, OptionError, OutputError
from spmconvert.model.architecture import load_config, runs_on
from spmconvert.model.loading import is_unused, load_whole
from spmconvert.model.opening import group_of
from spmconvert.model.saved import SavedNames
from spmconvert.model.stored import StoredNames
from spmconvert.outputs.objective import objective_for
from spmconvert.recipe.loading import training_from_keywords
from spmconvert.recipe.recipe import AUTO_TEXT, Training
from spmconvert.system.devices import check_device
from spmconvert.version import __version__


@dataclass(frozen=True)
class Finetuned:
    """The result of ``finetune``.

    Attributes:
        output: the finetuned checkpoint.
        steps: optimizer steps that were run.
        tokens: tokens trained on; rows for classifiers, images and sound.
        start_loss: held-out loss a token before.
        best_loss: held-out loss a token of what was written.
        objective: what the loss compares: ``logits``, ``classes``, ``scores`` or ``hidden`` states.
        history: all measurements on held-out rows.
        stopped: why the run ended early, or an empty string.
    """

    output: Path
    steps: int
    tokens: int
    start_loss: float
    best_loss: float
    objective: str
    history: list[dict[str, Any]]
    stopped: str


@dataclass(frozen=True)
class FinetuneOptions:
    """What a finetune is told beside its numbers: where its models are, where it runs, and what it may replace.

    Attributes:
        teacher: another place of the source checkpoint; None for the recorded one.
        teacher_logits: directory of stored logits that take the teacher's place.
        teacher_device: where the teacher is; None for the student's device.
        device: where the student is.
        shard: split parameters, gradients and optimizer over the processes (FSDP2), instead of a copy in each (DDP).
        tracker: experiment tracker that accelerate knows: tensorboard, wandb, trackio, ...
        in_place: replace the converted checkpoint; it stays as it was until the result is complete.
        force: replace an output that exists, discard an unfinished run, or train a result in place once more.
        resume: continue an interrupted run of the same settings.
    """

    teacher: str | None = None
    teacher_logits: str | Path | None = None
    teacher_device: str | None = None
    device: str = "cpu"
    shard: bool = False
    tracker: str | None = None
    in_place: bool = False
    force: bool = False
    resume: bool = False


@dataclass(frozen=True)
class _Inputs:
    """What decides about a finetune: the checkpoint, its verified source or that one's stored logits, rows and numbers."""

    converted: Converted
    source: Checkpoint
    rows: TrainingData
    training: Training
    stored: StoredLogits | None

    @property
    def fingerprint(self) -> str:
        """Hash of all of it; losses against a teacher and against stored logits are not alike."""
        weights = [str((name, entry.shape, entry.dtype)) for name, entry in self.converted.tensors.items()]
        teacher = self.source.sha256() if self.stored is None else self.stored.sha256
        provenance, numbers = json.dumps(self.converted.provenance), self.training.model_dump_json()
        return sha256(
            "\n".join([teacher, self.rows.sha256, provenance, *weights, numbers, __version__]).encode()
        ).hexdigest()

    def before_the_last_finetune(self) -> "_Inputs":
        """The same with what the checkpoint said of itself before it was finetuned in place."""
        provenance = dict(self.converted.provenance)
        provenance["finetune"] = provenance["finetune"][:-1]
        if not provenance["finetune"]:
            del provenance["finetune"]
        return replace(self, converted=replace(self.converted, provenance=provenance))


def finetune(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    data: str | Path = AUTO_TEXT,
    recipe: Training | str | Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    **changes: Any,
) -> Finetuned | None:
    """Distil a converted checkpoint against its source.

    Args:
        directory: output of a conversion.
        output: directory to write; None for the same name with ``-ft``. A log of the run is written beside it.
        data: .txt, .jsonl or .parquet file, ``datasets:ID``, a .safetensors file of a processor's tensors, or ``auto`` for
            prose that every Python installation has.
        recipe: numbers of the run, or the path of a recipe file with a table ``finetune``; None for the defaults.
        report: told about every step and measurement, in the first process.
        **changes: fields of ``FinetuneOptions`` and keys of ``Training``.

    Returns:
        What was reached; None in all processes but the first.

    Raises:
        SpmconvertError: see ``spmconvert.errors`` for the kinds.
    """
    options, training = _resolve(recipe, changes)
    check_device(options.device)
    training = settled_precision(training, options.device)
    if options.teacher_device is not None:
        check_device(options.teacher_device)
    destination = finetuned_output(Path(directory), output, in_place=options.in_place)
    if options.in_place:
        # a run that was killed between its last renames has left the checkpoint beside its place
        finish_commit(destination)
    inputs = _open_inputs(Path(directory), data, training, options)
    training = inputs.training
    _check_apart(destination, inputs, data, recipe, options)
    finished = _finished_in_place(inputs, options)
    if finished is not None:
        return finished
    accelerator = make_accelerator(
        training, options.device, shard=options.shard, tracker=options.tracker, output=destination
    )
    with ExitStack() as stack:
        target = None
        if accelerator.is_main_process:
            target = stack.enter_context(_open_output(inputs, destination, options))
        snapshot = share_snapshot(accelerator, None if target is None else target.partial / STATE_FILE)
        log = stack.enter_context(RunLog(destination, accelerator, training, snapshot, report))
        run = _make_run(inputs, options, accelerator, target, log)
        _run_stages(run, snapshot, shard=options.shard)
        result = _finish(run, inputs, destination, target)
        accelerator.wait_for_everyone()
    return result if accelerator.is_main_process else None


def _finish(run: TrainingRun, inputs: _Inputs, destination: Path, target: OutputDirectory | None) -> Finetuned:
    """Measure the best parameters once more and, in the first process, write them."""
    converted = inputs.converted
    best = {name: whole(value) for name, value in run.state.best.items()}
    student = run.distillation.student
    saved = SavedNames(student, StoredNames.of(student, converted.tensors))
    result = _result(run, destination, best, converted, {name: saved.first(name) for name in best})
    if target is not None:
        written = {stored: cut for name, value in best.items() for stored, cut in saved.tensors(name, value).items()}
        _write(converted, written, target, _provenance(inputs, run, result))
    return result


def _open_inputs(directory: Path, data: str | Path, training: Training, options: FinetuneOptions) -> _Inputs:
    converted, source, config = _open(directory, options.teacher)
    objective = objective_for(config)
    if training.train is None:
        parameters = sum(math.prod(entry.shape) for entry in converted.tensors.values())
        training = training.model_copy(update={"train": settled_scope(objective, parameters)})
    if training.batch_size is None:
        rows_of_step = settled_rows(objective, options.device, training.accumulation)
        training = training.model_copy(update={"batch_size": rows_of_step})
    rows = load_training_data(str(data), converted.directory, config, training, converted.layers)
    stored = None if options.teacher_logits is None else StoredLogits(Path(options.teacher_logits), source.sha256())
    return _Inputs(converted, source, rows, training, stored)


def _check_apart(
    destination: Path,
    inputs: _Inputs,
    data: str | Path,
    recipe: Training | str | Path | None,
    options: FinetuneOptions,
) -> None:
    reads: dict[str, str | Path | None] = {
        "teacher": inputs.source.directory,
        "data": data,
        "stored logits": options.teacher_logits,
        "recipe": None if isinstance(recipe, Training) else recipe,
        "input": None if options.in_place else inputs.converted.directory,
    }
    check_apart(destination, reads)
    check_log(destination)


def _resolve(recipe: Training | str | Path | None, changes: dict[str, Any]) -> tuple[FinetuneOptions, Training]:
    """Keywords sorted into what they belong to; unknown ones are refused as keys of ``Training``."""
    names = {item.name for item in fields(FinetuneOptions)}
    options = FinetuneOptions(**{key: value for key, value in changes.items() if key in names})
    return options, _resolve_training(recipe, {key: value for key, value in changes.items() if key not in names})


def _open_output(inputs: _Inputs, destination: Path, options: FinetuneOptions) -> OutputDirectory:
    converted = inputs.converted
    written = sum(entry.nbytes for entry in converted.tensors.values())
    carried = [str(file.relative_to(converted.directory)) for file in converted.checkpoint().companion_files()]
    return OutputDirectory(
        destination,
        fingerprint=inputs.fingerprint,
        force=options.force,
        resume=options.resume,
        # while a state is replaced the one before it still stands
        needed_bytes=written + 2 * state_bytes(converted, inputs.training),
        replaces=carried if options.in_place else None,
    )


def _finished_in_place(inputs: _Inputs, options: FinetuneOptions) -> Finetuned | None:
    """What a finetune in place had reached before its command was repeated; None where it is another one.

    Raises:
        OutputError: when the command would train the same once more and does not say so.
    """
    finetunes = inputs.converted.provenance.get("finetune")
    if not options.in_place or options.force or not finetunes:
        return None
    last, directory = finetunes[-1], inputs.converted.directory
    if last.get("fingerprint") != inputs.before_the_last_finetune().fingerprint:
        return None
    if not options.resume:
        raise OutputError(
            f"{directory} has been finetuned in place with these settings and this data; train it once more with "
            "--force, or change them"
        )
    return Finetuned(
        output=directory, **{item.name: last[item.name] for item in fields(Finetuned) if item.name != "output"}
    )


def _make_run(
    inputs: _Inputs, options: FinetuneOptions, accelerator: Any, target: OutputDirectory | None, log: RunLog
) -> TrainingRun:
    """Both models, what is trained, and what the loss compares."""
    converted, training, config = inputs.converted, inputs.training, load_config(inputs.converted.directory)
    _check_experts(converted, training)
    student = load_student(converted, training, accelerator.device)
    dense = None
    if inputs.stored is None:
        dense = load_teacher(inputs.source, config, options.teacher_device or accelerator.device)
    first = inputs.rows.held_out.batch([0], student, 0)
    with torch.no_grad(), runs_on(student, first):
        student(**first)
    trained = choose_trained(student, training)
    names = StoredNames.of(student, converted.tensors)
    for name in list(trained):
        if names.tensor(name) is None and is_unused(name, config):
            trained.pop(name).requires_grad_(False)
        else:
            SavedNames(student, names).first(name)
    objective = objective_for(config)
    if training.learning_rate is None:
        training = training.model_copy(
            update={"learning_rate": settled_rate(converted.kept, objective, training.rows_of_step)}
        )
    distillation = Distillation(student, dense, objective, training, converted_layers(student), inputs.stored)
    return TrainingRun(
        distillation=distillation,
        data=inputs.rows,
        training=training,
        accelerator=accelerator,
        called=student,
        trained=trained,
        structured=frozenset(structured_parameters(student)),
        save=partial(_save, target),
        report=log.write,
        guide=_guide(distillation),
    )


def _check_experts(converted: Converted, training: Training) -> None:
    """Refuse losses that compare layers token by token where layers are experts: these see other tokens in each model."""
    asked = [name for name in ("layerwise", "guided", "layer_outputs") if getattr(training, name)]
    expert = next((name for name in converted.layers if group_of(name)), None)
    if asked and expert is not None:
        raise OptionError(
            f"{asked[0]} compares layers on the same tokens, and {expert} is an expert, which sees others in each model; "
            f"leave {asked[0]} out"
        )


def store_teacher_logits(
    directory: str | Path,
    destination: str | Path,
    *,
    data: str | Path = AUTO_TEXT,
    words: int = 64,
    recipe: Training | str | Path | None = None,
    teacher: str | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda *_: None,
    **changes: Any,
) -> None:
    """Write the teacher's likeliest words for all rows of a text, so that ``finetune`` needs no teacher.

    Args:
        directory: output of a conversion.
        destination: directory to write; it must not exist.
        data: as for ``finetune``.
        words: words a token.
        recipe: as for ``finetune``; row length, held-out share, seed and column matter.
        teacher: as for ``finetune``.
        device: where the teacher is.
        report: told how many rows of how many are done.
        **changes: keys of ``Training``.

    Raises:
        SpmconvertError: see ``spmconvert.errors`` for the kinds.
    """
    training = _resolve_training(recipe, changes)
    check_device(device)
    converted, source, config = _open(directory, teacher)
    if objective_for(config) != "logits":
        raise OptionError(
            f"{config.architectures[0]} has no logits over words to store; distil it with the teacher in memory"
        )
    rows = load_training_data(str(data), converted.directory, config, training, converted.layers)
    dense = load_whole(source.directory, config, dtype="auto").to(device).eval()
    store_logits(Path(destination), dense, rows, teacher_sha256=source.sha256(), count=words, report=report)


def _open(directory: str | Path, teacher: str | None) -> tuple[Converted, Checkpoint, Any]:
    """The converted checkpoint, its verified source, and the model's config."""
    converted = open_converted(Path(directory))
    return converted, open_source(converted, teacher), load_config(converted.directory)


def _resolve_training(recipe: Training | str | Path | None, changes: dict[str, Any]) -> Training:
    if isinstance(recipe, Training):
        if changes:
            raise OptionError(f"a Training and {', '.join(changes)} are both given; change the Training instead")
        return recipe
    return training_from_keywords(changes, None if recipe is None else Path(recipe))


def finetuned_output(directory: Path, output: str | Path | None, *, in_place: bool) -> Path:
    """Where a finetune writes.

    Raises:
        OptionError: when that is the input, and it was not asked to be replaced.
    """
    if in_place and output is not None:
        raise OptionError(f"an output {output} and replacing the input in place are both asked for; choose one")
    if in_place:
        return directory
    resolved = directory.resolve()
    destination = Path(output) if output is not None else resolved.with_name(f"{resolved.name}{FINETUNED_SUFFIX}")
    if Path(os.path.realpath(destination)) == resolved:
        raise OptionError(f"the output {destination} is the input; choose another with -o, or ask for --in-place")
    return destination


def _guide(distillation: Distillation) -> Guide | None:
    steps = round(distillation.training.guided * (distillation.training.steps or 0))
    if not steps:
        return None
    student, teacher = distillation.student, distillation.teacher
    if teacher is None or teacher.device != student.device:
        raise OptionError("guided steps need the teacher on the student's device; set guided = 0 or move the teacher")
    return Guide(student, teacher, distillation.layers, steps)


def _run_stages(run: TrainingRun, snapshot: dict[str, Any] | None, *, shard: bool) -> State:
    """Layer by layer, then end to end, going on from a snapshot of either."""
    if snapshot is not None and snapshot["moments"] is None:
        restore(snapshot, run.state, run.trained, None)
        snapshot = None
    if run.training.layerwise and snapshot is None:
        match_layers(run, run.distillation.layers)
    run.called, parameters = prepare_student(
        run.accelerator, run.distillation.student, shard=shard, unused=partial(_some_unused, run)
    )
    run.trained = {name: parameters[name] for name in run.trained}
    return train(run, snapshot)


def _some_unused(run: TrainingRun) -> bool:
    """Whether some trained parameters may get no gradient in a step: a pooler that nothing compares, an idle expert."""
    if any(part in name for name in run.trained for part in (".experts.", ".expert.")):
        return True
    student = run.distillation.student
    run.distillation.loss(run.data.held_out.batch([0], student, 0)).total.backward()
    unused = any(parameter.grad is None for parameter in run.trained.values())
    student.zero_grad(set_to_none=True)
    return unused


def _save(target: OutputDirectory | None, snapshot: dict[str, Any]) -> None:
    if target is not None:
        target.save_file(STATE_FILE, partial(torch.save, snapshot))


def _result(
    run: TrainingRun, destination: Path, best: dict[str, Tensor], converted: Converted, stored_names: dict[str, str]
) -> Finetuned:
    """Measures the best parameters once more, rounded to the dtypes they are written in."""
    state = run.state
    if not best:
        raise FitError("the converted model has no finite loss on the held-out rows; convert it again")
    for name, value in best.items():
        best[name] = value.to(getattr(torch, SAFETENSORS_DTYPES[converted.tensors[stored_names[name]].dtype]))
    restore({"state": {}, "parameters": best, "moments": None}, state, run.trained, None)
    return Finetuned(
        output=destination,
        steps=state.step,
        tokens=state.tokens,
        start_loss=state.history[0]["held_out_loss"],
        best_loss=held_out_losses(run)["held_out_loss"],
        objective=run.distillation.objective,
        history=state.history,
        stopped=state.stopped,
    )


def _write(converted: Converted, best: dict[str, Tensor], target: OutputDirectory, provenance: dict[str, Any]) -> None:
    directory = converted.directory
    source = Checkpoint(directory, str(directory), None, converted.config, converted.tensors)

    def read(name: str) -> Tensor:
        return best[name] if name in best else source.read(name)

    target.write_weights([(name, entry.nbytes, partial(read, name)) for name, entry in converted.tensors.items()])
    target.add_text("config.json", (directory / "config.json").read_text(encoding="utf-8"))
    target.add_text(PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    card = directory / "README.md"
    if card.exists():
        target.add_text("README.md", finetuned_card(card.read_text(encoding="utf-8"), provenance["finetune"][-1]))
    for file in source.companion_files():
        target.add_file(str(file.relative_to(directory)), file)
    target.commit()


def _provenance(inputs: _Inputs, run: TrainingRun, result: Finetuned) -> dict[str, Any]:
    converted, data = inputs.converted, inputs.rows
    entry = {
        "fingerprint": inputs.fingerprint,
        "recipe": run.training.model_dump(mode="json"),
        "data_sha256": data.sha256,
        "seed": run.training.seed,
        "training_rows": len(data.training),
        "held_out_rows": min(len(data.held_out), run.training.evaluation_rows),
        "processes": run.accelerator.num_processes,
        "device": str(run.accelerator.device.type),
        "spmconvert_version": __version__,
        "torch_version": torch.__version__,
        "objective": result.objective,
        "steps": result.steps,
        "tokens": result.tokens,
        "start_loss": result.start_loss,
        "best_loss": result.best_loss,
        "history": result.history,
        "curve": [float(f"{loss:.5g}") for loss in run.state.curve],
        "stopped": result.stopped,
    }
    return {**converted.provenance, "finetune": [*converted.provenance.get("finetune", []), entry]}
