"""Fits of layers of one shape, one after the other and as one batch: how much a batch saves, and that it fits the same.

    python -m benchmarks.batched_fit --device cuda
    python -m benchmarks.batched_fit --device cpu --shape 96x256 --members 4 --iterations 20

A line is a design: seconds of all single fits, of the batch, their ratio, and how far errors and matrices are apart. Beside
it stands how far single fits are from themselves when the last digits of their weights are others, which is what rounding
alone does. Kernels are compiled and tuned by one untimed fit of either kind. The ratio is of whole fits, starts and
decompositions included; ``solver`` is that of what is solved together alone.

The gain on a GPU has not been measured yet. On a CPU there is none to expect.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import save_json
from benchmarks.environment import environment, synchronize
from benchmarks.fit_time import problem
from spmconvert.fit import batched_solver
from spmconvert.fit.aim import Aim, Solving, begin
from spmconvert.fit.batched_solver import fit_batch_
from spmconvert.fit.batches import member_bytes
from spmconvert.fit.solver import fit_aim_, solve_
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.recipe.recipe import Fit
from spmconvert.system.devices import check_device
from spmconvert.units import size

# half a unit in the last place of a float32
ROUNDING = 2.0**-24
# share of the parameters that a term and low rank beside it are given
KEPT = 0.25
FIRST_ITERATIONS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="576x1536", help="in_features x out_features")
    parser.add_argument("--members", type=int, default=32, help="layers of the batch")
    parser.add_argument("--iterations", type=int, default=Fit().iterations)
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    check_device(options.device)
    torch.set_num_threads(options.threads)
    rows = [measure(name, design, options) for name, design in designs(options.shape).items()]
    about = environment(options.device, "float32", options.threads)
    about |= {key: getattr(options, key) for key in ("shape", "members", "iterations")}
    show(about, rows)
    save_json(options.json, {"environment": about, "unit": "s", "rows": rows})


def designs(shape: str) -> dict[str, Design]:
    """Designs whose terms a gradient fits, by name."""
    sizes = [int(number) for number in shape.split("x")]
    whole = sizes[0] * sizes[1]
    rank = max(1, int(KEPT * whole) // sum(sizes) // 2)
    beside = {"kind": "lowrank", "rank": rank}
    columns = next(count for count in range(2, sizes[0] + 1) if sizes[0] % count == 0)
    monarch_rank = max(1, int(KEPT * whole) // (columns * sizes[1] + sizes[0]) // 2)
    monarch = {"kind": "monarch", "blocks_in": columns, "blocks_out": 1, "rank": monarch_rank}
    entries = {
        "stages": [{"kind": "spm"}],
        "stages + low rank": [{"kind": "spm"}, beside],
        "monarch": [monarch],
        "monarch + low rank": [monarch, beside],
        "wrapped 2:4": [{"kind": "sparse24", "wrap": True}],
    }
    return {name: Design.from_options(sizes[0], sizes[1], own) for name, own in entries.items()}


def measure(name: str, design: Design, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    weights = members(design, options)
    fit_batch_(aims(design, weights, options.device), iterations=FIRST_ITERATIONS)
    fit_aim_(aims(design, weights[:1], options.device)[0], iterations=FIRST_ITERATIONS)
    single, together, rounded = (aims(design, own, options.device) for own in (weights, weights, _rounded(weights)))
    seconds_single, ends = timed(lambda: [fit_aim_(aim, iterations=options.iterations).end for aim in single], options)
    _reset_peak(options.device)
    seconds_batch, batch_ends = timed(
        lambda: [result.end for result in fit_batch_(together, iterations=options.iterations)], options
    )
    peak = _peak(options.device)
    others = [fit_aim_(aim, iterations=options.iterations).end for aim in rounded]
    return {
        "design": name,
        "single": seconds_single,
        "batch": seconds_batch,
        "single/batch": seconds_single / seconds_batch,
        "solver single/batch": solver_ratio(design, weights, options),
        "error apart": _apart(batch_ends, ends),
        "error apart by rounding": _apart(others, ends),
        "matrix apart": matrices_apart(together, single),
        "matrix apart by rounding": matrices_apart(rounded, single),
        "peak bytes a member": peak / len(weights),
        "estimated bytes a member": member_bytes(design),
    }


def solver_ratio(design: Design, weights: Sequence[Any], options: argparse.Namespace) -> float:
    """Time of the solvers of single fits to that of the batch's, starts left out."""

    def begun() -> list[Solving]:
        found = [begin(aim, options.iterations) for aim in aims(design, weights, options.device)]
        return [one for one in found if isinstance(one, Solving)]

    single, together = begun(), begun()
    alone, _ = timed(lambda: [float(solve_(one, options.iterations)) for one in single], options)
    batch, _ = timed(lambda: list(map(float, batched_solver.solve_together_(together, options.iterations))), options)
    return alone / batch


def members(design: Design, options: argparse.Namespace) -> list[Any]:
    """Weights of all members, with the moments of their inputs."""
    weight, fitted, _ = problem(design.in_features, design.out_features, options.device)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(weight.shape, generator=generator).to(options.device) for _ in range(options.members)]
    return [(weight + weight.std() * one, fitted) for one in noise]


def aims(design: Design, weights: Sequence[Any], device: str) -> list[Aim]:
    """Fits of fresh layers, from a seed of their own each."""
    sizes = (design.in_features, design.out_features)
    return [
        Aim(SPMLinear(*sizes, terms=design.terms, device=device), weight, None, fitted, seed)
        for seed, (weight, fitted) in enumerate(weights)
    ]


def timed(run: Callable[[], list[float]], options: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of a call, and what it gave."""
    synchronize(options.device)
    began = time.perf_counter()
    with torch.enable_grad():
        found = run()
    synchronize(options.device)
    return time.perf_counter() - began, found


@torch.no_grad()
def matrices_apart(some: Sequence[Aim], others: Sequence[Aim]) -> float:
    """Largest distance of a layer's matrix from another's, relative to its norm."""
    pairs = [(one.layer.to_dense(), other.layer.to_dense()) for one, other in zip(some, others, strict=True)]
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def _rounded(weights: Sequence[Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    signs = [torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device) for weight, _ in weights]
    return [(weight * (1 + ROUNDING * sign), fitted) for (weight, fitted), sign in zip(weights, signs, strict=True)]


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(one - other) / other for one, other in zip(some, others, strict=True))


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> float:
    """Bytes, not known on a CPU."""
    return float(torch.cuda.max_memory_allocated(device)) if torch.device(device).type == "cuda" else float("nan")


def show(about: dict[str, object], rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    console = Console(width=150)
    console.print(" ".join(f"{key}={value}" for key, value in about.items()))
    table = Table(
        "design", "single fits", "batch", "single/batch", "solver", "error apart", "by rounding", "matrix apart",
        "by rounding", "a member takes", "estimated",
    )  # fmt: skip
    for row in rows:
        apart = [
            f"{row[key]:.1e}"
            for key in ("error apart", "error apart by rounding", "matrix apart", "matrix apart by rounding")
        ]
        peak = row["peak bytes a member"]
        takes = "-" if peak != peak else size(int(peak))
        ratios = [f"{row[key]:.2f}" for key in ("single/batch", "solver single/batch")]
        times = [f"{row[key]:.2f} s" for key in ("single", "batch")]
        table.add_row(row["design"], *times, *ratios, *apart, takes, size(row["estimated bytes a member"]))
    console.print(table)


if __name__ == "__main__":
    main()
