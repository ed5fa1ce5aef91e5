"""Time of one layer: dense nn.Linear, the SPM reference and the merged form, with ratios from the same run.

    python benchmarks/operator.py --json benchmarks/results/operator.json

Dense and merged are timed in turn, so that noise hits them alike; the reference is timed after them, because the gigabytes
it moves leave the caches cold for whoever comes next. The table shows medians.
Forward runs without gradients, with merged blocks cached; forward + backward merges at every step, as training does.
"""

import sys

# as a script this file's folder comes first on the path, and the file would pass for the standard library's operator
sys.path[:] = [entry for entry in sys.path if not entry.endswith("benchmarks")]

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from spmconvert.operator.linear import SPMLinear

SHAPES = "768x768,768x3072,3072x768,1024x1024,2048x2048,4096x4096,8192x8192"
IMPLEMENTATIONS = ("dense", "reference", "merged")
PERCENTILES = (20, 50, 80)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="in x out, comma-separated")
    parser.add_argument("--tokens", default="1,16,64,1024", help="numbers of tokens, comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--seconds", type=float, default=3, help="time a cell may take")
    parser.add_argument("--json", type=Path, help="write all percentiles there")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device here; use --device cpu")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [
        measure(shape, tokens, backward, options)
        for shape in (tuple(map(int, text.split("x"))) for text in options.shapes.split(","))
        for tokens in map(int, options.tokens.split(","))
        for backward in (False, True)
    ]
    result = {"environment": environment(options), "rows": rows}
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


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
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def environment(options: argparse.Namespace) -> dict[str, object]:
    """Where and with what the figures were made."""
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu_name()
    return {
        "device": name,
        "threads": options.threads,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    """Name of the CPU, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


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


if __name__ == "__main__":
    main()
