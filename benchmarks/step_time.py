"""Time of a training step: the converted model against its dense original, same batch, in turn.

    python -m benchmarks.step_time --json results/step-time.json

Both models are trained by the same loss and the same optimizer, the converted one on its SPM layers;
the dense model trains the layers that were converted. Neither runs a teacher. GPT-2 shapes from config, random weights:
time does not depend on them.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import save_json
from benchmarks.environment import environment
from spmconvert.model.swap import replace_module
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.targets import select_targets


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(width, options) for width in options.widths]
    table = Table("width", "MLP width", "MLP parameters kept", "dense ms a step", "converted ms a step", "dense/converted")
    for row in rows:
        times = [f"{row['dense']['p50']:.0f}", f"{row['converted']['p50']:.0f}", f"{row['dense/converted']:.2f}"]
        table.add_row(str(row["width"]), str(4 * row["width"]), f"{row['kept']:.1%}", *times)
    console = Console(width=120)
    about = environment("cpu", "float32", options.threads)
    about |= {key: getattr(options, key) for key in ("rows", "tokens", "layers", "repetitions")}
    console.print(" ".join(f"{key}={value}" for key, value in about.items()))
    console.print(table)
    save_json(options.json, {"environment": about, "unit": "ms", "rows": rows})


def measure(width: int, options: argparse.Namespace) -> dict[str, object]:
    """Percentiles of both models' steps, and the ratio of the medians."""
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": options.layers, "n_head": width // 64, "n_positions": options.tokens}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=1024, **sizes, **special)).eval().requires_grad_(False)
    converted = copy.deepcopy(dense)
    kept = before = 0
    for target in select_targets(dense, targets=("mlp",), ignore=(), layers=None).targets:
        layer = SPMLinear(target.in_features, target.out_features)
        replace_module(converted, target.name, layer)
        dense.get_submodule(target.name).requires_grad_(True)
        kept += sum(p.numel() for p in layer.parameters())
        before += target.in_features * target.out_features + target.out_features
    ids = torch.randint(1024, (options.rows, options.tokens))
    steps = {"dense": training_step(dense, ids), "converted": training_step(converted, ids)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(options.repetitions + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - began))
    found = {
        name: {f"p{p}": torch.tensor(values).quantile(p / 100).item() for p in (20, 50, 80)}
        for name, values in times.items()
    }
    return {
        "width": width,
        "kept": kept / before,
        **found,
        "dense/converted": found["dense"]["p50"] / found["converted"]["p50"],
    }


def training_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """One optimizer step on the same batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
