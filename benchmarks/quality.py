"""What a parameter budget costs in quality: ``--keep`` beside whitened SVD and other structures, with its parts turned off.

    python -m benchmarks.quality --model teachers/gpt2 --calibration wikitext-2-valid.txt --evaluate wikitext-2-test.txt
    python -m benchmarks.quality --model smollm2 --calibration wikitext-2-valid.txt --evaluate wikitext-2-test.txt
    python -m benchmarks.quality --encoder --calibration wikitext-2-test.txt --evaluate wikitext-2-valid.txt

All methods see the same calibration rows and may keep the same share of the same matrices. The baseline is uniform whitened
truncated SVD. ``keep`` is what ``spmconvert convert --keep`` does; the methods named after it change parts: low rank only,
stages or blocks beside a companion only, fits without output weights, layers fitted each alone, relative errors in place of
measured sensitivity (which leaves fits unweighted, too). ``drop blocks`` leaves out whole blocks. The blocks of all others
are refined alike (--refine 0 for none). With --steps, every method is finetuned alike, at all rates of a
small grid with the first seed, at the best of them by held-out loss with the others. A language model is scored by its
cross-entropy in nats a token on the other text (lower is better; its divergence from the dense model there is in the rows,
too), an encoder by the Spearman correlation of its sentence similarities with the dense model's (higher is better). The
time is that of a forward pass over 1024 tokens, divided by the dense model's in the same run. The energy that whitened SVD
leaves at half of the parameters says how fair the model is: below 4 % on the median layer it has rank to spare, and low
rank is nearly lossless whatever it is compared with.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from benchmarks.blocks import drop_blocks
from benchmarks.common import (
    STRUCTURES,
    Layer,
    calibrated_layers,
    distil,
    held_out_error,
    left_by_half_rank,
    remembering,
    replace_layers,
    save_json,
)
from benchmarks.environment import environment
from benchmarks.monarch import MonarchLinear
from benchmarks.quality_table import show
from benchmarks.scores import Examiner, language_score, packaged_model, sentences
from benchmarks.sparse import sparse
from spmconvert.commands.convert import convert
from spmconvert.data.calibration import CalibrationRows, load_rows
from spmconvert.data.training import load_training_data
from spmconvert.errors import OptionError
from spmconvert.fit.blocks import following_batches
from spmconvert.fit.refine import REFINEMENT_EPOCHS, refine_model_
from spmconvert.model.architecture import load_config
from spmconvert.model.loading import load
from spmconvert.model.swap import copy_sharing_tensors, replace_module
from spmconvert.outputs.objective import objective_for
from spmconvert.outputs.probe import token_batch
from spmconvert.recipe.recipe import Calibration, Training
from spmconvert.reporting.baselines import SparseLinear
from spmconvert.reporting.timing import forward_call, interleaved

# recipe changes of every method that goes through the converter
CONVERTED: dict[str, dict[str, Any]] = {
    "keep": {},
    "keep, low rank": {"structures": "lowrank"},
    "keep, low rank, plain fit": {"structures": "lowrank", "output_weighting": False},
    "keep, low rank, sequential": {"structures": "lowrank", "sequential": True},
    "keep, companion": {"structures": "spm,lowrank"},
    "keep, plain fit": {"output_weighting": False},
    "keep, independent": {"sequential": False},
    "keep, independent, plain fit": {"sequential": False, "output_weighting": False},
    "keep, independent, relative error": {"sequential": False, "sensitivity": "none"},
}
OTHERS = ("Monarch", "magnitude 2:4")
# leaves out whole blocks with as many parameters; of what is left the same layers are finetuned
DROPPED = "drop blocks"
# rows that the blocks are chosen on
DROPPING_ROWS = 8
# what a budget leaves as it is
DENSE = (torch.nn.Linear, Conv1D)
TIMED_TOKENS = 1024
TIMED_SECONDS = 4.0
METHODS = (*STRUCTURES, *OTHERS, DROPPED, *CONVERTED)


@dataclass
class Subject:
    """A model to compress, and how it is scored.

    Attributes:
        directory: its checkpoint.
        dense: the model itself.
        layers: what is replaced, with the moments of its inputs.
        calibration: text that is fitted and trained on.
        rows: calibration rows.
        score: of a model with some of the layers replaced; a language model's divergence from the dense one beside it.
    """

    directory: Path
    dense: Any
    layers: list[Layer]
    calibration: Path
    rows: int
    score: Callable[[Any], dict[str, float]]

    @cached_property
    def fitted_rows(self) -> CalibrationRows:
        """The calibration rows themselves."""
        calibration = Calibration(file=self.calibration, rows=self.rows)
        return load_rows(self.directory, self.dense.config, calibration, seed=0)

    @cached_property
    def teacher(self) -> Any:
        """The model as finetunes follow it where they match nothing but its last hidden states or logits."""
        return remembering(self.dense)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    subject = encoder_subject(options) if options.encoder else language_subject(options)
    result: dict[str, Any] = {
        "environment": environment("cpu", "float32", options.threads),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("json", "work")},
        "dense_score": subject.score(subject.dense)["score"],
        "left_by_half_rank": median(left_by_half_rank(layer) for layer in subject.layers),
        "rows": [],
    }
    for keep in options.keep:
        for method in options.methods:
            try:
                for row in measure(subject, method, keep, options):
                    result["rows"].append(row)
                    print(row, flush=True)
                    save_json(options.json, result)
            except OptionError as error:
                print(f"{method} at {keep:.0%} is left out: {error}", flush=True)
    show(result)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of the dense model; for an encoder that of the demo extra")
    parser.add_argument("--encoder", action="store_true", help="score sentence similarities")
    parser.add_argument("--calibration", type=Path, required=True, help="text to fit and train on")
    parser.add_argument("--evaluate", type=Path, required=True, help="another text, only measured")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration-rows", type=int, default=512)
    parser.add_argument("--evaluation-rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=0, help="of the finetune; 0 for none")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--other-rate", type=float, default=3e-4)
    parser.add_argument("--scope", choices=["spm", "norms", "all"], default="spm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layerwise", type=int, default=0)
    parser.add_argument("--guided", type=float, default=0.0)
    for option in ("--layer-outputs", "--hidden-states", "--pooled-states"):
        parser.add_argument(option, type=float, default=0.0, help="weight of this loss in the finetune")
    parser.add_argument(
        "--refine", type=int, default=REFINEMENT_EPOCHS, help="passes that refine the blocks, of every method"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="fits are kept there")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def language_subject(options: argparse.Namespace) -> Subject:
    """A causal language model, scored by cross-entropy."""
    dense = load(options.model, dtype=torch.float32).eval().requires_grad_(False)
    layers = calibrated_layers(options.model, dense, options.calibration, options.calibration_rows)
    score = language_score(options.model, dense, options.evaluate, options.evaluation_rows)
    return Subject(options.model, dense, layers, options.calibration, options.calibration_rows, score)


def encoder_subject(options: argparse.Namespace) -> Subject:
    """A sentence encoder, scored by rank correlation with itself."""
    directory = options.model or packaged_model()
    text = options.work / "sentences.txt"
    text.write_text("\n".join(sentences(options.calibration)), encoding="utf-8")
    dense = load(directory, dtype=torch.float32).eval().requires_grad_(False)
    layers = calibrated_layers(directory, dense, text, options.calibration_rows)
    examiner = Examiner(directory, sentences(options.evaluate)[: 5 * options.evaluation_rows], dense)
    return Subject(directory, dense, layers, text, options.calibration_rows, examiner.correlation)


def measure(subject: Subject, method: str, keep: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The score before, and one row a finetune with the score after it."""
    began = time.monotonic()
    student = build(subject, method, keep, options.work, options.refine)
    modules = {layer.name: student.get_submodule(layer.name) for layer in subject.layers if _has(student, layer.name)}
    names = frozenset(
        f"{name}.{part}"
        for name, module in modules.items()
        if method == DROPPED or not isinstance(module, DENSE)
        for part, _ in module.named_parameters()
    )
    targeted = sum(layer.weight.numel() for layer in subject.layers)
    row = {
        "method": method,
        "keep": keep,
        "kept": kept_without_blocks(subject, student)
        if method == DROPPED
        else sum(map(stored, modules.values())) / targeted,
        "layer_error": None
        if method == DROPPED
        else median(held_out_error(modules[layer.name], layer) for layer in subject.layers),
        **scores(subject, student, "before"),
        "seconds": round(time.monotonic() - began),
        "time": relative_time(student.eval(), subject.dense),
    }
    if not options.steps:
        yield row
        return
    rate, least = options.rates[0], float("inf")
    first, *others = options.seeds
    for one in options.rates:
        found = finetuned(subject, student, names, first, one, options)
        if found["held_out_loss"] < least:
            rate, least = one, found["held_out_loss"]
        yield {**row, "seed": first, "rate": one, **found}
    for seed in others:
        yield {**row, "seed": seed, "rate": rate, **finetuned(subject, student, names, seed, rate, options)}


def scores(subject: Subject, model: Any, when: str) -> dict[str, float]:
    """Fields of a row: the score before or after a finetune, and the divergence where there is one."""
    found = subject.score(model)
    return {when if name == "score" else f"{name}_{when}": value for name, value in found.items()}


def relative_time(student: Any, dense: Any) -> float:
    """Median time of a forward pass over the dense model's, both in turn."""
    batch = token_batch(dense, TIMED_TOKENS)
    calls = {"dense": forward_call(dense, batch), "student": forward_call(student, batch)}
    latency = interleaved(calls, TIMED_SECONDS, "cpu")
    return latency["student"].p50 / latency["dense"].p50


def build(subject: Subject, method: str, keep: float, work: Path, epochs: int) -> Any:
    """A model with the method's layers, its blocks refined in so many passes."""
    if method in CONVERTED:
        output = work / "converted"
        changes = {"calib": subject.calibration, "calibration.rows": subject.rows, "refine": epochs, **CONVERTED[method]}
        # the question is what parameters cost; the times stand beside
        convert(subject.directory, output, keep=keep, allow_slower=True, force=output.exists(), **changes)
        return load(output, dtype=torch.float32)
    student = copy_sharing_tensors(subject.dense)
    if method == DROPPED:
        return without_blocks(subject, student, keep)
    if method in STRUCTURES:
        replace_layers(student, subject.layers, method, keep, work / "fits")
    else:
        for layer in subject.layers:
            replace_module(student, layer.name, MonarchLinear.of(layer, keep) if method == "Monarch" else sparse(layer))
    if epochs:
        rows = subject.fitted_rows
        batches = following_batches(rows, subject.dense)
        refine_model_(student, subject.dense, [layer.name for layer in subject.layers], batches, epochs=epochs, seed=0)
    return student


def without_blocks(subject: Subject, student: Any, keep: float) -> Any:
    """The model without as many blocks as have the parameters that are saved elsewhere.

    Raises:
        OptionError: for a model that is no causal language model.
    """
    if objective_for(student.config) != "logits":
        raise OptionError("blocks are left out of language models alone")
    dropped = (1 - keep) * sum(layer.weight.numel() for layer in subject.layers)
    # rows of one length
    longest = max(map(len, subject.fitted_rows.fitted))
    rows = [row for row in subject.fitted_rows.fitted if len(row) == longest][:DROPPING_ROWS]
    return drop_blocks(student, [layer.name for layer in subject.layers], dropped, torch.stack(rows)).model


def kept_without_blocks(subject: Subject, student: Any) -> float:
    """Share of the targeted parameters that would be kept if the saved ones were theirs."""
    saved = sum(p.numel() for p in subject.dense.parameters()) - sum(p.numel() for p in student.parameters())
    return 1 - saved / sum(layer.weight.numel() for layer in subject.layers)


def _has(model: Any, name: str) -> bool:
    return name in dict(model.named_modules())


def finetuned(
    subject: Subject, base: Any, names: frozenset[str], seed: int, rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    """The score after a finetune, and the least held-out loss of it."""
    training = Training(
        steps=options.steps, batch_size=options.batch_size, learning_rate=rate, train=options.scope, seed=seed,
        other_learning_rate=options.other_rate, block_size=64 if options.encoder else 128,
        evaluate_every=max(1, options.steps // 4), layerwise=options.layerwise, guided=options.guided,
        layer_outputs=options.layer_outputs, hidden_states=options.hidden_states, pooled_states=options.pooled_states,
    )  # fmt: skip
    data = load_training_data(str(subject.calibration), subject.directory, load_config(subject.directory), training)
    student, began = copy.deepcopy(base), time.monotonic()
    whole = training.layerwise or training.guided or training.layer_outputs or training.hidden_states
    state = distil(student, subject.dense if whole else subject.teacher, data, training, names)
    spent = round(time.monotonic() - began)
    return {**scores(subject, student, "after"), "held_out_loss": state.best_loss, "finetune_seconds": spent}


def stored(module: torch.nn.Module) -> int:
    """Parameters of a layer in the place of a weight, its bias left out."""
    if isinstance(module, SparseLinear):
        return int((module.weight != 0).sum())
    return sum(
        parameter.numel() for name, parameter in module.named_parameters() if name not in ("bias", "lowrank.up.bias")
    )


if __name__ == "__main__":
    main()
