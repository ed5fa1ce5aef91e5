"""Seconds that the fit of one layer takes by each backend, and the error it ends at.

    python -m benchmarks.fit_time --device cuda --json benchmarks/results/fit-time-cuda.json

The default is an MLP layer of a Llama of seven billion parameters, 4096 -> 11008, one pass of stages, as many iterations
as a conversion takes, in float32. Weights and inputs are random, the inputs with a spectrum that falls as 1/k: the time
does not depend on them, and the error is that of a matrix without structure, of use only to see that the backends agree.
A short fit before the timed one takes what only the first has to do: compile, and find the fastest tiles.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import save_json
from benchmarks.environment import environment, synchronize
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_
from spmconvert.operator.linear import SPMLinear
from spmconvert.recipe.recipe import Fit
from spmconvert.system.devices import check_device

FIRST_ITERATIONS = 1


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x11008", help="in x out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", help="comma-separated; default merged, on CUDA merged,triton")
    parser.add_argument("--stages", type=int, help="default: one pass over all strides")
    parser.add_argument("--rank", type=int, default=0, help="rank of the companion")
    parser.add_argument("--iterations", type=int, default=Fit().iterations)
    parser.add_argument("--precision", choices=["highest", "high"], default="highest", help="of float32 products")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    check_device(options.device)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    backends = options.backends or ("merged,triton" if options.device.startswith("cuda") else "merged")
    rows = [measure(backend, options) for backend in backends.split(",")]
    for row in rows:
        row[f"{rows[0]['backend']}/this"] = rows[0]["seconds"] / row["seconds"]
    about = environment(options.device, "float32", options.threads)
    about |= {key: getattr(options, key) for key in ("shape", "stages", "rank", "iterations", "precision")}
    show(about, rows)
    save_json(options.json, {"environment": about, "unit": "s", "rows": rows})


def measure(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: the same fit, from the same start, by one backend."""
    in_features, out_features = map(int, options.shape.split("x"))
    weight, fitted, held_out = problem(in_features, out_features, options.device)
    for iterations in (FIRST_ITERATIONS, options.iterations):
        layer = SPMLinear(
            in_features, out_features, stages=options.stages, rank=options.rank, backend=backend, device=options.device
        )
        synchronize(options.device)
        result = fit_(layer, weight, None, fitted, iterations=iterations)
        synchronize(options.device)
    with torch.no_grad():
        error = measure_error((weight, None), (layer.to_dense(), layer.held_bias), held_out)
    return {
        "backend": backend,
        "seconds": result.seconds,
        "fitted_error": result.end,
        "held_out_error": error.centred,
        "kept": layer.design.parameter_count(bias=False) / weight.numel(),
    }


def problem(
    in_features: int, out_features: int, device: str
) -> tuple[torch.Tensor, ActivationStatistics, ActivationStatistics]:
    """A dense weight, and the moments of inputs to fit on and of others to measure on."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    scale = torch.arange(1, in_features + 1)[torch.randperm(in_features, generator=generator)] ** -0.5
    moments = [
        ActivationStatistics.of(torch.randn(2 * in_features, in_features, generator=generator) * scale).to(device)
        for _ in range(2)
    ]
    return weight.to(device), *moments


def show(about: dict[str, object], rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    console = Console(width=120)
    console.print(" ".join(f"{key}={value}" for key, value in about.items()))
    ratio = f"{rows[0]['backend']}/this"
    table = Table("backend", "seconds", ratio, "error, fitted rows", "error, held-out rows", "parameters kept")
    for row in rows:
        errors = [f"{row[key]:.5f}" for key in ("fitted_error", "held_out_error")]
        table.add_row(row["backend"], f"{row['seconds']:.2f}", f"{row[ratio]:.2f}", *errors, f"{row['kept']:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
