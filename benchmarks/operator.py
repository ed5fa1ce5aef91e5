"""Time of one layer: dense nn.Linear, the SPM reference and the merged form, with ratios from the same run.

    python benchmarks/operator.py --json benchmarks/results/operator.json
    python benchmarks/operator.py --device cuda --json benchmarks/results/operator-cuda.json

Dense and merged are timed in turn, so that noise hits them alike; the reference is timed after them, because the gigabytes
it moves leave the caches cold for whoever comes next. The table shows medians.
Forward runs without gradients, with merged blocks cached; forward + backward merges at every step, as training does.

On CUDA dense, merged and Triton are compared, in bfloat16, with layers and inputs rotated past the cache and small
numbers of tokens replayed from a graph (``rotation.py``); ``--rotate`` does the same on a CPU.
"""

import sys

# as a script this file's folder comes first on the path, and the file would pass for the standard library's operator
sys.path[:] = [entry.removesuffix("benchmarks") for entry in sys.path]

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, synchronize
from benchmarks.rotation import PERCENTILES, copy_bandwidth, measure_rotated
from spmconvert.operator.linear import SPMLinear

SHAPES = "768x768,768x3072,3072x768,1024x1024,2048x2048,4096x4096,8192x8192"
TOKENS = "1,16,64,1024"
IMPLEMENTATIONS = ("dense", "reference", "merged")
ROTATED_TOKENS = "1,16,256,4096,16384"
ROTATED_IMPLEMENTATIONS = ["dense", "merged", "triton"]


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="in x out, comma-separated")
    parser.add_argument("--tokens", help=f"numbers of tokens; default {TOKENS}, rotated {ROTATED_TOKENS}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rotate", action="store_true", help="rotate layers past the cache; always done on CUDA")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--seconds", type=float, help="time a cell may take; default 3, on CUDA 0.75")
    parser.add_argument("--json", type=Path, help="write all percentiles there")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device here; use --device cpu")
    options.rotate = options.rotate or cuda
    options.tokens = options.tokens or (ROTATED_TOKENS if options.rotate else TOKENS)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.seconds = (0.75 if cuda else 3.0) if options.seconds is None else options.seconds
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {"environment": environment(options.device, options.dtype, options.threads)}
    cells = [
        (shape, tokens, backward)
        for shape in (tuple(map(int, text.split("x"))) for text in options.shapes.split(","))
        for tokens in map(int, options.tokens.split(","))
        for backward in (False, True)
    ]
    if options.rotate:
        result["copy_bandwidth_GB/s"] = copy_bandwidth(options.device) / 1e9
        result["rows"] = rotated_rows(cells, result["copy_bandwidth_GB/s"] * 1e9, options)
        show_rotated(result)
    else:
        result["rows"] = [measure(*cell, options) for cell in cells]
        show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def rotated_rows(
    cells: list[tuple[tuple[int, int], int, bool]], bandwidth: float, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Every cell by the protocol of ``rotation``."""
    common = {"device": options.device, "dtype": getattr(torch, options.dtype), "seconds": options.seconds}
    return [
        measure_rotated(ROTATED_IMPLEMENTATIONS, shape, tokens, backward=backward, bandwidth=bandwidth, **common)
        for shape, tokens, backward in cells
    ]


def measure(shape: tuple[int, ...], tokens: int, backward: bool, options: argparse.Namespace) -> dict[str, object]:
    """One line of the table: percentiles in milliseconds of every implementation, and ratios of the medians."""
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    layers = {
        "dense": torch.nn.Linear(*shape, **place),
        "reference": SPMLinear(*shape, backend="reference", **place),
        "merged": SPMLinear(*shape, backend="merged", **place),
    }
    x = torch.randn(tokens, shape[0], **place)
    grad = torch.randn(tokens, shape[1], **place)
    steps = {name: step(layer, x, grad, backward) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for together in (("dense", "merged"), ("reference",)):
        for name in together:
            steps[name]()
        end = time.perf_counter() + options.seconds / 2
        while len(times[together[0]]) < 3 or (time.perf_counter() < end and len(times[together[0]]) < 200):
            for name in together:
                times[name].append(timed(steps[name], options.device))
    percentiles = {
        name: {f"p{p}": torch.tensor(values).quantile(p / 100).item() * 1e3 for p in PERCENTILES}
        for name, values in times.items()
    }
    dense = percentiles["dense"]["p50"]
    return {
        "in_features": shape[0],
        "out_features": shape[1],
        "tokens": tokens,
        "pass": "forward+backward" if backward else "forward",
        "unit": "ms",
        "repetitions": len(times["dense"]),
        **percentiles,
        "dense/reference": dense / percentiles["reference"]["p50"],
        "dense/merged": dense / percentiles["merged"]["p50"],
    }


def step(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, backward: bool) -> Callable[[], None]:
    """A function that runs the layer once."""
    if not backward:
        layer.eval()

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return forward
    leaf = x.clone().requires_grad_()

    def both() -> None:
        layer.zero_grad()
        leaf.grad = None
        layer(leaf).backward(grad)

    return both


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one run."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def show(result: dict[str, object]) -> None:
    """Print the table."""
    console = Console(width=120)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    table = Table(
        "in x out", "tokens", "pass", *(f"{name} ms" for name in IMPLEMENTATIONS), "dense/reference", "dense/merged"
    )
    for row in result["rows"]:
        times = [f"{row[name]['p50']:.3f}" for name in IMPLEMENTATIONS]
        ratios = [f"{row[key]:.2f}" for key in ("dense/reference", "dense/merged")]
        table.add_row(f"{row['in_features']} x {row['out_features']}", str(row["tokens"]), row["pass"], *times, *ratios)
    console.print(table)


def show_rotated(result: dict[str, object]) -> None:
    """Print the table of the rotated layers: a median, bytes a second at the floor's bytes, and the share of the floor."""
    console = Console(width=170)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    console.print(f"a large copy moves {result['copy_bandwidth_GB/s']:.1f} GB/s; share = time of such a copy / time")
    ratios = [f"dense/{name}" for name in ROTATED_IMPLEMENTATIONS[1:]]
    table = Table(
        "in x out", "tokens", "pass", "launch", *(f"{name} ms, GB/s, share" for name in ROTATED_IMPLEMENTATIONS), *ratios
    )
    for row in result["rows"]:
        cells = [row[name] for name in ROTATED_IMPLEMENTATIONS]
        figures = [f"{c['p50']:.4f} {c['GB/s']:7.1f} {c['share_of_floor']:4.0%}" for c in cells]
        place = [f"{row['in_features']} x {row['out_features']}", str(row["tokens"]), row["pass"], row["launch"]]
        table.add_row(*place, *figures, *(f"{row[key]:.2f}" for key in ratios))
    console.print(table)


if __name__ == "__main__":
    main()
