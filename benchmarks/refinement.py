"""Loss, size and speed of a language model by ways to make it smaller, each with its blocks refined and not.

    python -m benchmarks.smollm2 smollm2
    python -m benchmarks.refinement smollm2 --calibration valid.txt --evaluate test.txt
    python -m benchmarks.refinement smollm2 --calibration valid.txt --evaluate test.txt --speedup 1.25

All methods replace the same matrices, are fitted on the same rows, and keep the same share of the parameters. ``svd`` is
whitened truncated SVD of the same rank share everywhere, ``keep`` is what ``spmconvert convert --keep`` does, ``drop
blocks`` leaves out the run of blocks without which the last hidden state changes least, with as many blocks as come nearest
to the parameters; it has no refinement. With --speedup all have to be so much faster instead: ``keep`` is what
``spmconvert convert --speedup`` does, ``low rank`` the same by low rank alone, and ``drop blocks`` leaves out as few blocks
as are needed; --targets says what the first two may replace. The loss is that of a text that nothing was fitted on, in nats
a token, on windows of 512 that are spread over it; the speed is a 512-token forward pass of the dense model, timed in turn.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.blocks import Shortened, drop_blocks, drop_run
from benchmarks.common import save_json
from benchmarks.environment import environment
from spmconvert.commands.convert import convert, open_plan
from spmconvert.data.tokens import load_tokenizer
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.loading import load
from spmconvert.operator.factors import rank_at
from spmconvert.recipe.recipe import Recipe
from spmconvert.system.timing import interleaved_seconds

DROPPED = "drop blocks"
METHODS = ("svd", "keep", DROPPED)
# by time, with what they add to a budget
TIMED: dict[str, dict[str, Any]] = {"keep": {}, "low rank": {"structures": "lowrank"}}
WINDOW = 512
# windows that blocks to drop are chosen on
DROPPING_ROWS = 8
TIMED_SECONDS = 6.0


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="the dense checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text to fit and refine on")
    parser.add_argument("--evaluate", type=Path, required=True, help="another text, only measured")
    parser.add_argument("--keep", type=float, nargs="+", help="default 0.25 0.5, and none with --speedup")
    parser.add_argument("--speedup", type=float, nargs="+", default=[])
    parser.add_argument("--targets", default="mlp", help="of conversions by time")
    parser.add_argument("--methods", nargs="+", choices=sorted({*METHODS, *TIMED}), help="default all")
    parser.add_argument("--epochs", type=int, nargs="+", help="of the refinement; default none and the tool's own")
    parser.add_argument("--allow-slower", action="store_true", help="let keep build layers that are slower than dense ones")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("refinement"), help="directory for converted models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.speedup and "svd" in (options.methods or ()):
        parser.error("svd has a share of the parameters and no speed-up; leave it out of --methods, or --speedup")
    if not options.speedup and "low rank" in (options.methods or ()):
        parser.error("low rank is chosen by time; give --speedup")
    torch.set_num_threads(options.threads)
    dense = load(options.directory, dtype=torch.float32).eval()
    windows = windows_of(options.directory, options.evaluate, options.windows)
    result: dict[str, Any] = {
        "environment": environment("cpu", "float32", torch.get_num_threads()),
        "windows": len(windows),
        "dense": loss(dense, windows),
        "rows": [],
    }
    for row, model in all_measured(dense, options):
        result["rows"].append({**row, "loss": loss(model, windows), "faster": faster(dense, model, windows[:1])})
        print(result["rows"][-1], flush=True)
        if options.json:
            save_json(options.json, result)
    show(result)


def all_measured(dense: nn.Module, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """A row and a model of every method and budget."""
    shares = options.keep if options.keep is not None else [] if options.speedup else [0.25, 0.5]
    for keep in shares:
        for row, model in measured(dense, keep, options):
            yield {"keep": keep, **row}, model
    for speedup in options.speedup:
        for row, model in measured_by_time(dense, speedup, options):
            yield {"speedup": speedup, **row}, model


def measured(dense: nn.Module, keep: float, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """A row and a model of every method at a share of the parameters."""
    for method in options.methods or METHODS:
        if method == DROPPED:
            yield without_blocks(dense, keep, options)
            continue
        if method not in METHODS:
            continue
        budget = {"keep": keep, "allow_slower": options.allow_slower}
        changes = budget if method == "keep" else {"overrides": same_share(options.directory, keep)}
        for epochs in options.epochs or (0, None):
            yield converted(
                method, options.work / f"{method}-{keep}-{epochs}", options, refine=epochs, targets="mlp", **changes
            )


def measured_by_time(
    dense: nn.Module, speedup: float, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """A row and a model of every method at a speed-up."""
    for method in options.methods or (*TIMED, DROPPED):
        if method == DROPPED:
            yield fast_without_blocks(dense, speedup, options)
        elif method in TIMED:
            output = options.work / f"{method.replace(' ', '-')}-{speedup}x"
            changes = {"speedup": speedup, "tokens": WINDOW, "targets": options.targets, **TIMED[method]}
            yield converted(method, output, options, **changes)


def converted(method: str, output: Path, options: argparse.Namespace, **changes: Any) -> tuple[dict[str, Any], nn.Module]:
    """A row and a model of one conversion."""
    began = time.perf_counter()
    done = convert(options.directory, output, force=True, calib=str(options.calibration), **changes)
    row = {"method": method, "parameters": done.parameters_after / done.parameters_before}
    row |= {"epochs": refined_epochs(output), "seconds": time.perf_counter() - began}
    return row, load(output, dtype=torch.float32).eval()


def refined_epochs(output: Path) -> int:
    """Passes of the refinement, as they are recorded."""
    epochs: int = json.loads((output / "spm.json").read_text(encoding="utf-8"))["recipe"]["fit"]["refine"]
    return epochs


def same_share(directory: Path, keep: float) -> list[dict[str, Any]]:
    """Low rank of the same share of every matrix."""
    _, plan, _ = open_plan(str(directory), Recipe(targets=("mlp",)))
    found = []
    for target in (layer.target for layer in plan.layers):
        allowed = int(keep * target.in_features * target.out_features)
        rank = rank_at(allowed, target.in_features, target.out_features)
        found.append({"pattern": target.name, "terms": [{"kind": "lowrank", "rank": rank}]})
    return found


def without_blocks(dense: Any, keep: float, options: argparse.Namespace) -> tuple[dict[str, Any], nn.Module]:
    """The model without the run of blocks that its last hidden state depends on least."""
    _, plan, _ = open_plan(str(options.directory), Recipe(targets=("mlp",)))
    dropped = (1 - keep) * sum(layer.dense_parameters for layer in plan.layers)
    rows = windows_of(options.directory, options.calibration, DROPPING_ROWS)
    return shortened(drop_blocks(dense, [layer.target.name for layer in plan.layers], dropped, rows), options)


def fast_without_blocks(dense: Any, speedup: float, options: argparse.Namespace) -> tuple[dict[str, Any], nn.Module]:
    """The model without the shortest run of blocks that makes it so much faster.

    Raises:
        ValueError: when none does.
    """
    _, plan, _ = open_plan(str(options.directory), Recipe(targets=("mlp",)))
    names = [layer.target.name for layer in plan.layers]
    rows = windows_of(options.directory, options.calibration, DROPPING_ROWS)
    for count in range(1, dense.config.num_hidden_layers - 1):
        found = drop_run(dense, names, count, rows)
        if faster(dense, found.model, rows[:1]) >= speedup:
            return shortened(found, options)
    raise ValueError(f"no run of blocks makes the model {speedup:g} times faster")


def shortened(found: Shortened, options: argparse.Namespace) -> tuple[dict[str, Any], nn.Module]:
    """A row and a model without a run of blocks."""
    total = sum(parameter.numel() for parameter in skeleton(load_config(options.directory)).parameters())
    method = f"{DROPPED} {found.first} to {found.first + found.count - 1}"
    parameters = sum(parameter.numel() for parameter in found.model.parameters()) / total
    return {"method": method, "epochs": 0, "seconds": 0.0, "parameters": parameters}, found.model


def windows_of(directory: Path, text: Path, count: int) -> Tensor:
    """Windows of a text that do not overlap, spread over it evenly, [windows, tokens]."""
    ids = load_tokenizer(directory)(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    """Cross-entropy in nats a token."""
    total = 0.0
    for batch in windows.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (WINDOW - 1))


@torch.no_grad()
def faster(dense: Any, model: Any, row: Tensor) -> float:
    """How many times faster than the dense model a forward pass is."""
    calls = {"dense": lambda: dense(row, use_cache=False), "own": lambda: model(row, use_cache=False)}
    seconds = interleaved_seconds(calls, TIMED_SECONDS, "cpu")
    return median(seconds["dense"]) / median(seconds["own"])


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("budget", "method", "passes", "parameters", "loss", "above dense", "faster", "seconds", box=None)
    for row in result["rows"]:
        above = f"{row['loss'] - result['dense']:+.3f}"
        kept = f"{row['keep']:.0%}" if "keep" in row else f"{row['speedup']:g}x"
        passes, share = str(row["epochs"]), f"{row['parameters']:.1%}"
        table.add_row(
            kept,
            row["method"],
            passes,
            share,
            f"{row['loss']:.3f}",
            above,
            f"{row['faster']:.2f}x",
            f"{row['seconds']:.0f}",
        )
    print(f"dense: {result['dense']:.3f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
