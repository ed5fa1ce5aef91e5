"""How much of the loss a finetune wins back: structures of equal size in the MLPs of a small language model.

    python -m benchmarks.teacher --text wikitext-2-valid.txt --output teachers/gpt2
    python -m benchmarks.distillation --model teachers/gpt2 --train wikitext-2-valid.txt --evaluate wikitext-2-test.txt

Every structure is fitted on the same calibration rows of the training text and finetuned alike: same steps, rows, seed and
recipe; the learning rate is the best of a small grid for each structure, by held-out loss on documents of the training
text. The share of the gap is (converted - finetuned) / (converted - teacher), in cross-entropy on the other text, which is
only measured. The line about fairness is the energy that whitened SVD leaves at half of the parameters on the median layer:
below 4 % the model has rank to spare and low rank is nearly lossless whatever it is compared with.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import STRUCTURES, Layer, dense_layers, distil, left_by_half_rank, replace_layers, save_json
from benchmarks.environment import environment
from spmconvert.conversion import load
from spmconvert.distill.data import load_training_data
from spmconvert.distill.objective import Distillation
from spmconvert.fitting.calibration import load_rows
from spmconvert.fitting.statistics import collect
from spmconvert.recipe import Calibration, Training
from spmconvert.surgery.architecture import load_config
from spmconvert.surgery.targets import select_targets


def main() -> None:
    """Measure, print the table, and write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    bench = prepare(options)
    fairness = torch.tensor([left_by_half_rank(layer) for layer in bench.layers]).median().item()
    result: dict[str, Any] = {
        "environment": environment("cpu", "float32", options.threads),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("json", "work")},
        "teacher_loss": bench.loss(bench.teacher),
        "left_by_half_rank": fairness,
        "rows": [],
    }
    print(f"teacher {result['teacher_loss']:.4f} nats; whitened SVD leaves {fairness:.1%} at half", flush=True)
    for keep in options.keep:
        for structure in options.structures:
            for row in measure(bench, structure, keep, options):
                gap = row["converted"] - result["teacher_loss"]
                row["gap_closed"] = (row["converted"] - row["finetuned"]) / gap
                result["rows"].append(row)
                print(row, flush=True)
                save_json(options.json, result)
    show(result)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the dense model")
    parser.add_argument("--train", type=Path, required=True, help="text to fit and train on")
    parser.add_argument("--evaluate", type=Path, required=True, help="another text, only measured")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layerwise", type=int, default=0)
    parser.add_argument("--guided", type=float, default=0.0)
    parser.add_argument("--scope", choices=["spm", "norms", "all"], default="spm")
    parser.add_argument("--evaluation-rows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/distillation"), help="fits are kept there")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclass
class Bench:
    """The dense model, its layers to replace, and its loss on the text that only measures."""

    directory: Path
    config: Any
    teacher: Any
    layers: list[Layer]
    loss: Callable[[Any], float]


def prepare(options: argparse.Namespace) -> Bench:
    """Load the model and gather statistics."""
    teacher = load(options.model, dtype=torch.float32).eval().requires_grad_(False)
    layers = calibrated_layers(options.model, teacher, options.train, 512)
    loss = language_score(options.model, teacher, options.evaluate, options.evaluation_rows)
    return Bench(options.model, load_config(options.model), teacher, layers, loss)


def calibrated_layers(directory: Path, model: Any, text: Path, count: int) -> list[Layer]:
    """The MLP layers of a model with the moments of their inputs on calibration rows."""
    rows = load_rows(directory, load_config(directory), Calibration(file=text, rows=count), 0)
    names = [target.name for target in select_targets(model, targets=("mlp",), ignore=(), layers=None).targets]
    fitted, held_out = (collect(model, names, rows.batches(part, model)) for part in (rows.fitted, rows.held_out))
    return dense_layers(model, {name: (fitted[name], held_out[name]) for name in names})


def language_score(directory: Path, teacher: Any, text: Path, most: int) -> Callable[[Any], float]:
    """A function that gives a model's cross-entropy in nats a token on the first rows of a text."""
    rows = load_training_data(str(text), directory, load_config(directory), Training()).training

    @torch.no_grad()
    def score(model: Any) -> float:
        own = Distillation(model, teacher, "logits", Training())
        total = words = 0.0
        for first in range(0, min(len(rows), most), 16):
            loss = own.loss(rows.batch(range(first, min(first + 16, len(rows), most)), model, 0), measure=True)
            total += loss.parts["cross_entropy"].item()
            words += loss.parts["words"].item()
        return total / words

    return score


def measure(bench: Bench, structure: str, keep: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a seed: the best rate by held-out loss."""
    base = copy.deepcopy(bench.teacher)
    about = replace_layers(base, bench.layers, structure, keep, options.work)
    converted = bench.loss(base)
    rows = []
    for seed in options.seeds:
        tried = []
        for rate in options.rates:
            training = Training(
                steps=options.steps, batch_size=options.batch_size, learning_rate=rate, train=options.scope, seed=seed,
                layerwise=options.layerwise, guided=options.guided, evaluate_every=max(1, options.steps // 6),
            )  # fmt: skip
            data = load_training_data(str(options.train), bench.directory, bench.config, training)
            student, began = copy.deepcopy(base), time.monotonic()
            state = distil(student, bench.teacher, data, training, about["names"])
            tried.append((state.best_loss, rate, bench.loss(student), round(time.monotonic() - began)))
        held_out_loss, rate, finetuned, seconds = min(tried)
        rows.append(
            {
                "structure": structure,
                "keep": keep,
                "kept": about["kept"] / about["dense"],
                "seed": seed,
                "layer_error": about["error"],
                "converted": converted,
                "finetuned": finetuned,
                "rate": rate,
                "held_out_kl": held_out_loss,
                "all_rates": {f"{rate:g}": loss for _, rate, loss, _ in tried},
                "seconds": seconds,
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """The table."""
    table = Table("kept", "structure", "seed", "layer error", "converted", "finetuned", "gap closed", "rate")
    for row in result["rows"]:
        losses = [f"{row[key]:.4f}" for key in ("layer_error", "converted", "finetuned")]
        share = f"{row['gap_closed']:.1%}"
        table.add_row(f"{row['kept']:.1%}", row["structure"], str(row["seed"]), *losses, share, f"{row['rate']:g}")
    console = Console(width=140)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    console.print(
        f"teacher {result['teacher_loss']:.4f} nats a token; SVD leaves {result['left_by_half_rank']:.1%} at half"
    )
    console.print(table)


if __name__ == "__main__":
    main()
