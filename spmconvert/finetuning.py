"""Recovering quality: a converted checkpoint is distilled against the dense one it came from.

Read top to bottom: ``finetune`` is the whole of it. The teacher is the recorded source, checked by its hash; the student is
trained in float32 and written in the dtypes it came in, every tensor that was not trained byte for byte. The converted model
is never changed in place: the result appears beside it by one rename, and until then the run lives in the working directory
of the output, from where it can be resumed.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spmconvert.checkpoint.converted import Converted, open_converted
from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.checkpoint.manifest import PROVENANCE_FILE
from spmconvert.checkpoint.reader import Checkpoint, open_checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.conversion import load
from spmconvert.devices import check_device
from spmconvert.distill.data import TrainingText, load_training_text
from spmconvert.distill.loop import Schedule, State, train
from spmconvert.distill.losses import Distillation, objective_for
from spmconvert.errors import CheckpointError, FitError, OptionError
from spmconvert.operator.linear import SPMLinear
from spmconvert.surgery.architecture import load_config, model_class
from spmconvert.version import __version__

Trained = Literal["spm", "norms", "all"]
TRAINED: tuple[Trained, ...] = ("spm", "norms", "all")


@dataclass(frozen=True)
class Finetuned:
    """The result of ``finetune``.

    Attributes:
        output: the finetuned checkpoint.
        steps: optimizer steps that were run.
        tokens: tokens trained on.
        start_loss: held-out loss a token before.
        best_loss: lowest held-out loss a token, of the state that was kept.
        objective: what the loss compares.
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


def finetune(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    data: str | Path,
    teacher: str | None = None,
    steps: int = 500,
    learning_rate: float = 3e-3,
    other_learning_rate: float = 1e-4,
    batch_size: int = 16,
    accumulation: int = 1,
    block_size: int = 128,
    trained: Trained = "spm",
    temperature: float = 1.0,
    held_out: float = 0.05,
    evaluate_every: int = 50,
    save_every: int = 100,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Finetuned:
    """Distil a converted checkpoint against its source.

    Args:
        directory: output of a conversion.
        output: directory to write; None for the same name with ``-ft``.
        data: text file, .txt or .jsonl.
        teacher: another place of the source checkpoint; None for the recorded one.
        steps: optimizer steps.
        learning_rate: of the SPM layers.
        other_learning_rate: of everything else that is trained.
        batch_size: rows a step.
        accumulation: parts a step's rows are cut into.
        block_size: tokens a row.
        trained: ``spm`` layers only, with all ``norms`` and biases, or ``all``.
        temperature: of the teacher's and student's distributions.
        held_out: share of the documents that only measure.
        evaluate_every: steps between measurements.
        save_every: steps between checkpoints.
        seed: seed of the split and of the order of rows.
        device: where student and teacher are.
        force: replace an output that exists.
        resume: continue an interrupted run of the same settings.
        report: told about every step and measurement.

    Raises:
        SpmconvertError: see ``spmconvert.errors`` for the kinds.
    """
    settings = {
        key: value for key, value in locals().items() if key not in ("force", "resume", "report", "output", "device")
    }
    _check_numbers(settings)
    check_device(device)
    converted = open_converted(Path(directory))
    source = _open_teacher(converted, teacher)
    config = load_config(converted.directory)
    text = load_training_text(Path(data), converted.directory, config, tokens=block_size, held_out=held_out, seed=seed)
    destination = Path(output) if output is not None else converted.directory.with_name(f"{converted.directory.name}-ft")
    fingerprint = _fingerprint(converted, source, text, settings)
    size = sum(entry.nbytes for entry in converted.tensors.values())
    # two states of the optimizer and the best parameters, in float32, at most
    with OutputDirectory(destination, fingerprint=fingerprint, force=force, resume=resume, needed_bytes=4 * size) as target:
        student = load(converted.directory, dtype=torch.float32).to(device).eval()
        dense = model_class(config).from_pretrained(source.directory, dtype=torch.float32).to(device).eval()
        dense.requires_grad_(False)
        chosen = choose_trained(student, trained)
        schedule = Schedule(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            other_learning_rate=other_learning_rate,
            weight_decay=0.01,
            warm_up=0.05,
            clip=1.0,
            evaluate_every=evaluate_every,
            save_every=save_every,
            evaluation_rows=256,
            seed=seed,
        )
        distillation = Distillation(student, dense, objective_for(config), temperature)
        state = _train(distillation, text, schedule, chosen, target, device, report)
        if not state.best_loss < float("inf"):
            raise FitError("the converted model has no finite loss on the held-out rows; convert it again")
        result = Finetuned(
            output=destination,
            steps=state.step,
            tokens=state.tokens,
            start_loss=state.history[0]["held_out_loss"],
            best_loss=state.best_loss,
            objective=distillation.objective,
            history=state.history,
            stopped=state.stopped,
        )
        _write(converted, state, target, _provenance(converted, text, settings, result))
    return result


def choose_trained(student: nn.Module, trained: Trained) -> dict[str, nn.Parameter]:
    """Freeze everything but what is trained; returns the trained parameters by name.

    Raises:
        OptionError: when the choice is unknown.
    """
    if trained not in TRAINED:
        raise OptionError(f"train is {trained!r}; choose one of {', '.join(TRAINED)}")
    inside = {
        f"{name}.{part}"
        for name, module in student.named_modules()
        if isinstance(module, SPMLinear)
        for part, _ in module.named_parameters()
    }
    chosen = {}
    for name, parameter in student.named_parameters():
        wanted = trained == "all" or name in inside or (trained == "norms" and parameter.ndim == 1)
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    return chosen


def _check_numbers(settings: dict[str, Any]) -> None:
    for key in ("steps", "batch_size", "accumulation", "block_size", "evaluate_every", "save_every"):
        if settings[key] < 1:
            raise OptionError(f"{key} is {settings[key]}; it must be at least 1")
    for key in ("learning_rate", "temperature"):
        if not settings[key] > 0:
            raise OptionError(f"{key} is {settings[key]}; it must be above 0")
    if not 0 < settings["held_out"] < 1:
        raise OptionError(f"held_out is {settings['held_out']}; it must be between 0 and 1")
    if settings["accumulation"] > settings["batch_size"]:
        raise OptionError(
            f"accumulation is {settings['accumulation']}, batch_size {settings['batch_size']}; a part needs a row"
        )


def _open_teacher(converted: Converted, teacher: str | None) -> Checkpoint:
    """The dense checkpoint, checked against the hash that the conversion recorded."""
    recorded = converted.provenance["source"]
    source = open_checkpoint(teacher or recorded["name"], revision=None if teacher else recorded["revision"])
    if source.sha256() != recorded["sha256"]:
        raise CheckpointError(
            f"{source.directory} is not the checkpoint that {converted.directory} was converted from (another content hash); "
            "name the right one with --teacher"
        )
    return source


def _fingerprint(converted: Converted, source: Checkpoint, text: TrainingText, settings: dict[str, Any]) -> str:
    weights = [str((name, entry.shape, entry.dtype)) for name, entry in converted.tensors.items()]
    parts = [source.sha256(), text.file_sha256, json.dumps(converted.provenance), *weights, __version__]
    numbers = {key: value for key, value in settings.items() if key not in ("directory", "data", "teacher")}
    return sha256("\n".join([*parts, json.dumps(numbers)]).encode()).hexdigest()


def _train(
    distillation: Distillation,
    text: TrainingText,
    schedule: Schedule,
    trained: dict[str, nn.Parameter],
    target: OutputDirectory,
    device: str,
    report: Callable[[dict[str, Any]], None],
) -> State:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    kept = target.load_state()
    restored = None if kept is None else torch.load(io.BytesIO(kept), weights_only=True)

    def save(snapshot: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(snapshot, buffer)
        target.store_state(buffer.getvalue())

    return train(distillation, text, schedule, accelerator, trained=trained, restored=restored, save=save, report=report)


def _write(converted: Converted, state: State, target: OutputDirectory, provenance: dict[str, Any]) -> None:
    source = Checkpoint(converted.directory, str(converted.directory), None, converted.config, converted.tensors)
    prefixes = {name: _stored_name(name, converted) for name in state.best}
    by_stored = {stored: name for name, stored in prefixes.items()}

    def read(stored: str) -> Tensor:
        if stored not in by_stored:
            return source.read(stored)
        dtype = getattr(torch, SAFETENSORS_DTYPES[converted.tensors[stored].dtype])
        return state.best[by_stored[stored]].to("cpu", dtype)

    target.write_weights([(name, entry.nbytes, partial(read, name)) for name, entry in converted.tensors.items()])
    target.add_text("config.json", (converted.directory / "config.json").read_text(encoding="utf-8"))
    target.add_text(PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    card = (converted.directory / "README.md").read_text(encoding="utf-8")
    target.add_text("README.md", card.replace(UNTUNED, _tuned(provenance["finetune"][-1])))
    for file in source.companion_files():
        target.add_file(str(file.relative_to(converted.directory)), file)
    target.commit()


# the sentence of the model card that a finetune replaces
UNTUNED = "The model has not been finetuned after the conversion."


def _tuned(run: dict[str, Any]) -> str:
    return (
        f"It was then distilled against its source for {run['steps']} steps, {run['tokens']:,} tokens; held-out loss a token "
        f"{run['start_loss']:.4g} before, {run['best_loss']:.4g} after. The errors below are from before."
    )


def _stored_name(name: str, converted: Converted) -> str:
    """Name of a parameter in the checkpoint, which may lack or have the base model's prefix."""
    if name in converted.tensors:
        return name
    candidates = [stored for stored in converted.tensors if stored.endswith(f".{name}") or name.endswith(f".{stored}")]
    if len(candidates) != 1:
        raise CheckpointError(f"parameter {name} is not a tensor of {converted.directory}; train fewer parameters")
    return candidates[0]


def _provenance(converted: Converted, text: TrainingText, settings: dict[str, Any], result: Finetuned) -> dict[str, Any]:
    run = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if key != "directory"},
        "data_sha256": text.file_sha256,
        "training_rows": len(text.training),
        "held_out_rows": len(text.held_out),
        "spmconvert_version": __version__,
        "torch_version": torch.__version__,
        **{key: value for key, value in asdict(result).items() if key != "output"},
    }
    return {**converted.provenance, "finetune": [*converted.provenance.get("finetune", []), run]}
