"""What keeping stages and companion apart costs and saves: error, size of the parts, and what half precision loses.

    python -m benchmarks.companion --calibration wikitext-2-valid.txt --json benchmarks/results/companion.json

MLP layers of the demo's encoder, one pass of stages beside a companion. The penalty is on what stages put where the
companion is; without it both drift and cancel. Errors are of centred outputs on held-out rows, beside those of whitened
SVD of the same size. Sizes are root mean squares in units of the whole layer's. What half precision loses is the squared
difference to the float32 layer, relative to its outputs, on inputs drawn with the mean and covariance of the held-out rows.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Layer, calibrated_layers, save_json
from benchmarks.environment import environment
from benchmarks.scores import packaged_model
from spmconvert.fit import problem
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_
from spmconvert.model.loading import load
from spmconvert.operator.factors import covariance_root, rank_at, truncated_svd
from spmconvert.operator.linear import SPMLinear

DRAWN_INPUTS = 2048


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="text to fit on")
    parser.add_argument("--layers", nargs="+", default=["1.output.dense", "1.intermediate.dense", "4.output.dense"])
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = packaged_model()
    layers = calibrated_layers(directory, load(directory).eval(), options.calibration, options.rows)
    chosen = [layer for layer in layers if any(layer.name.endswith(name) for name in options.layers)]
    rows = [measure(layer, penalty, options) for penalty in options.penalties for layer in chosen]
    about = environment("cpu", "float32", torch.get_num_threads())
    about |= {key: getattr(options, key) for key in ("rank", "iterations", "rows")}
    show(rows)
    save_json(options.json, {"environment": about, "chosen": problem.DUPLICATION_PENALTY, "rows": rows})


def measure(layer: Layer, penalty: float, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    out_features, in_features = layer.weight.shape
    module = SPMLinear(in_features, out_features, rank=options.rank)
    default = problem.DUPLICATION_PENALTY
    problem.DUPLICATION_PENALTY = penalty
    try:
        fit_(module, layer.weight, layer.bias, layer.fitted, iterations=options.iterations, seed=1)
    finally:
        problem.DUPLICATION_PENALTY = default
    rank = rank_at(module.design.parameter_count(bias=False), in_features, out_features)
    svd = torch.matmul(*truncated_svd(layer.weight, covariance_root(layer.fitted.covariance), rank))
    svd_bias = layer.fitted.corrected_bias(layer.weight, svd, layer.bias)
    with torch.no_grad():
        whole, companion = module.to_dense(), module.lowrank.matrix()
        size = _size(whole, layer)
        return {
            "layer": layer.name,
            "penalty": penalty,
            "error": measure_error(layer.dense, (whole, module.held_bias), layer.held_out).centred,
            "svd_error": measure_error(layer.dense, (svd, svd_bias), layer.held_out).centred,
            "stages": _size(whole - companion, layer) / size,
            "companion": _size(companion, layer) / size,
            **{str(dtype).removeprefix("torch."): _lost(module, layer, dtype) for dtype in (torch.bfloat16, torch.float16)},
        }


def _size(matrix: torch.Tensor, layer: Layer) -> float:
    return (matrix @ layer.held_out.covariance * matrix).sum().clamp_min(0).sqrt().item()


def _lost(module: SPMLinear, layer: Layer, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DRAWN_INPUTS, layer.weight.shape[1], generator=generator)
    inputs = layer.held_out.mean + directions @ covariance_root(layer.held_out.covariance)
    outputs = module(inputs)
    rounded = copy.deepcopy(module).to(dtype)(inputs.to(dtype)).float()
    return ((rounded - outputs).square().sum() / outputs.square().sum()).item()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
