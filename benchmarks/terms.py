"""Time of one layer by what it is the sum of, beside nn.Linear and two plain products in the same run.

    python -m benchmarks.terms --json benchmarks/results/terms-cpu.json

Every layer is timed in turn with the dense one and with two ``nn.Linear`` of the rank that a quarter of the parameters
allows; figures are medians of ratios to the dense layer's time, above 1 is faster than dense. ``low rank / plain`` is the
plain products' time by that of the tool's own low rank. Losing rows stand in the same table as winning ones.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.environment import environment
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.monarch import Monarch
from spmconvert.operator.terms.sparse24 import Sparse24
from spmconvert.operator.terms.spm import Stages
from spmconvert.operator.terms.term import Term
from spmconvert.system.timing import interleaved_seconds

SHAPES = "384x1536,1536x384,576x1536,1536x576,768x3072,3072x768,2048x8192,8192x2048"
TOKENS = "1,128,1024"
KEPT = 0.25
# of the parameters that a term has beside low rank
BESIDE_SHARE = 1 / 3
COLUMNS = (
    "plain U(Vx)",
    "low rank",
    "stages + low rank",
    "wide block + low rank",
    "monarch + low rank",
    "monarch",
    "stages, one pass",
    "2:4",
)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="in x out, comma-separated")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long each pair may take")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for shape in options.shapes.split(","):
        in_features, out_features = map(int, shape.split("x"))
        layers = layers_of(in_features, out_features)
        for tokens in map(int, options.tokens.split(",")):
            ratios = {name: ratio(layer, tokens, options.seconds) for name, layer in layers.items()}
            agreement = agree(layers["plain U(Vx)"], layers["low rank"], tokens, options.seconds)
            rows.append({"shape": shape, "tokens": tokens, **ratios, "low rank / plain": agreement})
    result = {"environment": environment("cpu", "float32", options.threads), "kept": KEPT, "rows": rows}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def layers_of(in_features: int, out_features: int) -> dict[str, nn.Module]:
    """Layers of a quarter of the parameters; one pass of stages and 2:4 have the size they have."""
    dense = in_features * out_features
    allowed = int(KEPT * dense)
    rank = allowed // (in_features + out_features)
    plain = nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))
    one_pass = Stages.of(Geometry.create(in_features, out_features))
    sums: dict[str, list[Term]] = {
        "low rank": [LowRank(in_features, out_features, rank)],
        "stages + low rank": beside(one_pass, allowed),
        "wide block + low rank": beside(wide_block(in_features, out_features, int(BESIDE_SHARE * allowed)), allowed),
        "monarch + low rank": beside(largest(Monarch, in_features, out_features, int(BESIDE_SHARE * allowed)), allowed),
        "monarch": [largest(Monarch, in_features, out_features, allowed)],
        "stages, one pass": [one_pass],
        "2:4": [Sparse24(in_features, out_features)],
    }
    built = {name: SPMLinear(in_features, out_features, terms=terms) for name, terms in sums.items()}
    return {"plain U(Vx)": plain.eval(), **{name: layer.eval() for name, layer in built.items()}}


def beside(term: Term, allowed: int) -> list[Term]:
    """A term with the low rank that is left."""
    rank = (allowed - term.parameter_count()) // (term.in_features + term.out_features)
    return [term, LowRank(term.in_features, term.out_features, max(1, rank))]


def wide_block(in_features: int, out_features: int, parameters: int) -> Stages:
    """A single stage of the widest blocks that fit."""
    blocks = [2**power for power in range(1, min(in_features, out_features).bit_length())]
    terms = [Stages.of(Geometry.create(in_features, out_features, 1, "general", block)) for block in blocks]
    return max((term for term in terms if term.parameter_count() <= parameters), key=Stages.parameter_count)


def largest(kind: type[Term], in_features: int, out_features: int, parameters: int) -> Term:
    """The largest design of a kind that fits."""
    return max(kind.designs(in_features, out_features, parameters), key=lambda term: term.parameter_count())


def ratio(layer: nn.Module, tokens: int, seconds: float) -> float:
    """Dense time by the layer's."""
    in_features, out_features = sizes(layer)
    return agree(nn.Linear(in_features, out_features).eval(), layer, tokens, seconds)


def agree(rival: nn.Module, layer: nn.Module, tokens: int, seconds: float) -> float:
    """Time of a rival by a layer's, median over rounds in which each ran once."""
    x = torch.randn(1, tokens, sizes(layer)[0])

    def call(module: nn.Module) -> Any:
        with torch.no_grad():
            return module(x)

    calls = {"rival": lambda: call(rival), "layer": lambda: call(layer)}
    for run in calls.values():
        run()
    times = interleaved_seconds(calls, seconds, "cpu", fewest=21)
    return statistics.median(a / b for a, b in zip(times["rival"], times["layer"], strict=True))


def sizes(layer: Any) -> tuple[int, int]:
    """Input and output of a layer, or of a chain of layers."""
    first, last = (layer[0], layer[-1]) if isinstance(layer, nn.Sequential) else (layer, layer)
    return first.in_features, last.out_features


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(width=170)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    table = Table("in x out", "tokens", *COLUMNS, "low rank / plain")
    for row in result["rows"]:
        table.add_row(row["shape"], str(row["tokens"]), *(f"{row[name]:.2f}" for name in (*COLUMNS, "low rank / plain")))
    console.print(table)


if __name__ == "__main__":
    main()
