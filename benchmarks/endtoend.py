"""Tokens a second of whole models, dense and with every MLP layer replaced, in prefill, decode and training.

    python benchmarks/endtoend.py --device cuda --json benchmarks/results/endtoend-cuda.json
    python benchmarks/endtoend.py --tiny

The models have the shapes of GPT-2 medium and of a Llama of a billion parameters, random weights from their config
classes, and SPM layers with random stages: what is timed is the arithmetic, the text that comes out means nothing.
Prefill runs one prompt, decode continues it token by token with the key-value cache, training is forward, backward and a
step of SGD. Decode launches every operation from Python, as ``generate`` does, so on a GPU launches bound it.

Models are timed one after the other, not in turns as layers are, because two of them need not fit side by side.
"""

import sys

# as a script this file's folder comes first on the path, where operator.py would pass for the standard library's
sys.path[:] = [entry.removesuffix("benchmarks") for entry in sys.path]

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.environment import environment, synchronize
from spmconvert.model.swap import replace_module
from spmconvert.operator.linear import SPMLinear
from spmconvert.plan.targets import select_targets

PHASES = ("prefill", "decode", "training")
LENGTHS = {"prompt": 1024, "decoded": 32, "batch": 4, "trained": 512}
TINY_LENGTHS = {"prompt": 24, "decoded": 3, "batch": 2, "trained": 20}


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", default="gpt2-medium,llama-1b", help="comma-separated")
    parser.add_argument("--backends", help="backends to compare with dense; default merged, on CUDA merged,triton")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated")
    parser.add_argument("--tiny", action="store_true", help="narrow models, two blocks, short texts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--samples", type=int, default=5, help="repetitions of a phase; the median is reported")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device here; use --device cpu")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    torch.set_num_threads(options.threads)
    backends = ["dense", *(options.backends or ("merged,triton" if cuda else "merged")).split(",")]
    rows = [measure(name, backend, options) for name in options.models.split(",") for backend in backends]
    for row in rows:
        dense = next(other for other in rows if other["model"] == row["model"])
        row |= {f"{phase}/dense": row[phase] / dense[phase] for phase in options.phases.split(",")}
    lengths = TINY_LENGTHS if options.tiny else LENGTHS
    result = {"environment": environment(options.device, options.dtype, options.threads), "unit": "tokens/s"}
    result |= {"samples": options.samples, "lengths": lengths, "rows": rows}
    show(result, options.phases.split(","))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def configuration(name: str, tiny: bool) -> Any:
    """Config of a model's shape; tiny ones keep the ratios of the layers and lose their width."""
    marks = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "gpt2-medium":
        sizes = {"n_embd": 96, "n_layer": 2, "n_head": 2, "vocab_size": 64} if tiny else {}
        return GPT2Config(**{"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 2048, **marks, **sizes})
    if name == "llama-1b":
        sizes = {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        }
        tiny_sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 64}
        tiny_sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaConfig(**{**sizes, **marks, **(tiny_sizes if tiny else {})})
    raise SystemExit(f"--models {name}: choose gpt2-medium or llama-1b")


def build(name: str, backend: str, options: argparse.Namespace) -> Any:
    """The model on the device, its MLP layers replaced unless the backend is ``dense``."""
    torch.manual_seed(0)
    config = configuration(name, options.tiny)
    model = (GPT2LMHeadModel if name == "gpt2-medium" else LlamaForCausalLM)(config)
    model.to(options.device, getattr(torch, options.dtype))
    if backend == "dense":
        return model
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    for target in select_targets(model, targets=["mlp"]).targets:
        layer = SPMLinear(target.in_features, target.out_features, target.bias, backend=backend, **place)
        replace_module(model, target.name, layer)
    return model


def measure(name: str, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one model in every phase, and its parameters."""
    model = build(name, backend, options)
    lengths = TINY_LENGTHS if options.tiny else LENGTHS
    phases = {"prefill": prefill, "decode": decode, "training": training}
    row = {"model": name, "backend": backend, "parameters": sum(p.numel() for p in model.parameters())}
    for phase in options.phases.split(","):
        tokens, run = phases[phase](model, lengths, options.device)
        run()
        row[phase] = tokens / median(timed(run, options.device) for _ in range(options.samples))
    del model, run
    gc.collect()
    return row


def prefill(model: Any, lengths: dict[str, int], device: str) -> tuple[int, Callable[[], None]]:
    """One prompt; returns its tokens and a function that runs it."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, lengths["prompt"]), device=device)

    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    return ids.numel(), run


def decode(model: Any, lengths: dict[str, int], device: str) -> tuple[int, Callable[[], None]]:
    """Tokens after a prompt, each the likeliest; the cache is cut back to the prompt after every repetition."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, lengths["prompt"]), device=device)
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        token = ids[:, -1:]
        with torch.no_grad():
            for _ in range(lengths["decoded"]):
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-lengths["decoded"])

    return lengths["decoded"], run


def training(model: Any, lengths: dict[str, int], device: str) -> tuple[int, Callable[[], None]]:
    """One step on a batch of random tokens."""
    model.train()
    ids = torch.randint(model.config.vocab_size, (lengths["batch"], lengths["trained"]), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return ids.numel(), run


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one run."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def show(result: dict[str, Any], phases: list[str]) -> None:
    """Print the table."""
    console = Console(width=130)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    table = Table("model", "backend", "parameters", *(f"{phase} tokens/s (of dense)" for phase in phases))
    for row in result["rows"]:
        figures = [f"{row[phase]:.1f} ({row[f'{phase}/dense']:.2f})" for phase in phases]
        table.add_row(row["model"], row["backend"], f"{row['parameters'] / 1e6:.2f}M", *figures)
    console.print(table)


if __name__ == "__main__":
    main()
