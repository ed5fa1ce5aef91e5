"""Quality of one layer by what it is the sum of: held-out error of every structure, at equal parameters and equal bytes.

    python -m benchmarks.structures DIRECTORY --layers '*.3.mlp.up_proj' --text wikitext-2-valid.txt --json FILE

Errors are of the centred outputs on rows that were not fitted, in the plain norm. At 50 % of the parameters a 2:4 matrix
takes 53 % of the bytes in float32 and 56 % in half precision, which its indices are counted in; ``bytes`` are of float16.
"""

import argparse
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Layer, calibrated_layers, save_json
from benchmarks.environment import environment
from spmconvert.budget.candidates import designs_of, standing_designs_of
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_
from spmconvert.model.loading import load
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.sparse24 import Sparse24

KINDS = ("monarch", "spm", "blockdense")
HALF = 2
# shares of the parameters that 2:4 with low rank has
ADDED = (0.54, 0.6)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="dense checkpoint")
    parser.add_argument("--layers", nargs="+", required=True, help="globs")
    parser.add_argument("--text", type=Path, required=True, help="text to fit and measure on")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--wrap-blocks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = calibrated_layers(options.directory, load(options.directory).eval(), options.text, options.rows)
    chosen = [layer for layer in layers if any(fnmatchcase(layer.name, pattern) for pattern in options.layers)]
    rows = []
    for layer in chosen:
        for design in designs(layer, options):
            rows.append(measure(layer, design, options.iterations))
            show([rows[-1]])
    about = environment("cpu", "float32", torch.get_num_threads())
    save_json(options.json, {"environment": about, "rows_of_text": options.rows, "rows": rows})


def designs(layer: Layer, options: argparse.Namespace) -> list[Design]:
    """Everything that is compared on a layer."""
    out_features, in_features = layer.weight.shape
    sizes = (in_features, out_features)
    found = []
    for kept in options.kept:
        parameters = int(kept * in_features * out_features)
        found.append(Design(*sizes, (LowRank(*sizes, parameters // sum(sizes)),)))
        for kind in KINDS:
            found += designs_of(kind, *sizes, parameters, beside_low_rank=True)
    found += standing_designs_of("sparse24", *sizes)
    for kept in ADDED:
        found += designs_of("sparse24", *sizes, int(kept * in_features * out_features), beside_low_rank=True)
    for block in options.wrap_blocks:
        term = Sparse24.from_options(*sizes, {"wrap": True, "wrap_block": block, "wrap_stages": 1})
        found += [Design(*sizes, (term,)), same_bytes(term)]
    return found


def same_bytes(term: Sparse24) -> Design:
    """A bare 2:4 matrix with the low rank that a wrapped one's stages are worth."""
    bare = Sparse24(term.in_features, term.out_features)
    rank = (term.parameter_count() - bare.parameter_count()) // (term.in_features + term.out_features)
    low_rank = LowRank(term.in_features, term.out_features, max(1, rank))
    return Design(term.in_features, term.out_features, (bare, low_rank))


def measure(layer: Layer, design: Design, iterations: int) -> dict[str, Any]:
    """One line of the table."""
    module = SPMLinear(design.in_features, design.out_features, terms=design.terms)
    began = time.perf_counter()
    fit_(module, layer.weight, layer.bias, layer.fitted, iterations=iterations)
    seconds = time.perf_counter() - began
    dense = design.in_features * design.out_features
    with torch.no_grad():
        error = measure_error(layer.dense, (module.to_dense(), module.held_bias), layer.held_out).centred
    return {
        "layer": layer.name,
        "design": design.describe(),
        "kept": design.parameter_count(bias=False) / dense,
        "bytes": design.stored_bytes(HALF, bias=False) / (HALF * dense),
        "error": error,
        "seconds": seconds,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print lines of the table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        kept, stored = f"{row['kept']:.1%} of parameters", f"{row['bytes']:.1%} of bytes"
        table.add_row(row["layer"], row["design"], kept, stored, f"{row['error']:.4f}", f"{row['seconds']:.1f} s")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
