"""What a block of converted experts takes: stacked and run together, stacked in a loop, and a layer an expert in a loop.

    python -m benchmarks.stacked --device cuda --dtype bfloat16

OLMoE's experts with random numbers, both projections of one design, without a router: experts are chosen at random. Times
are those of transformers' own dense experts by its grouped products divided by each (above 1 is faster), in turn in one
run, without gradients. ``together`` is what a loaded model does where it can; with stages it is a loop as well.
"""

import argparse
import copy
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.common import save_json
from benchmarks.environment import environment
from spmconvert.model.experts import OpenedExperts
from spmconvert.model.stacked_experts import StackedExperts
from spmconvert.operator.factors import rank_at
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import ALIGNED
from spmconvert.system.timing import interleaved_seconds

KEEP, STAGES, BLOCK, SECONDS = 0.25, 6, 32, 6.0


def main() -> None:
    """Measure, and print a line a structure and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "environment": environment(options.device, options.dtype, options.threads),
        "settings": {key: str(value) for key, value in vars(options).items() if key != "json"},
        "rows": [],
    }
    for structure in ("low rank", "stages"):
        for row in measured(options, structure):
            result["rows"].append(row)
            print(row, flush=True)
            if options.json:
                save_json(options.json, result)


@torch.no_grad()
def measured(options: argparse.Namespace, structure: str) -> list[dict[str, Any]]:
    """Ratios of times by number of tokens."""
    config = OlmoeConfig(
        num_experts=options.experts, hidden_size=options.width, intermediate_size=options.inner, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    placed = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    dense = OlmoeExperts(config).to(**placed)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
    opened = OpenedExperts(copy.deepcopy(dense), options.chosen)
    for expert in opened.experts:
        for name, layer in list(expert.named_children()):
            setattr(expert, name, layer_of(structure, layer, placed))
    together = StackedExperts(copy.deepcopy(opened))
    loop = copy.deepcopy(together)
    loop._opened[0]._fused[0].config._experts_implementation = "eager"
    modules = {"dense": dense, "together": together, "stacked, in a loop": loop, "a layer an expert": opened}
    rows = []
    for tokens in options.tokens:
        states = torch.randn(tokens, options.width, **placed)
        index = torch.rand(tokens, options.experts, device=options.device).topk(options.chosen).indices
        weights = torch.full(index.shape, 1 / options.chosen, **placed)
        calls = {name: partial(module, states, index, weights) for name, module in modules.items()}
        times = {name: statistics.median(own) for name, own in interleaved_seconds(calls, SECONDS, options.device).items()}
        ratios = {name: round(times["dense"] / own, 2) for name, own in times.items()}
        rows.append({"structure": structure, "tokens": tokens, "dense seconds": times["dense"], **ratios})
    return rows


def layer_of(structure: str, dense: nn.Module, placed: dict[str, Any]) -> SPMLinear:
    """A quarter of the parameters in low rank, to a multiple of eight, or six stages of blocks."""
    sizes = dense.in_features, dense.out_features
    if structure == "low rank":
        rank = rank_at(int(KEEP * sizes[0] * sizes[1]), *sizes) // ALIGNED * ALIGNED
        return SPMLinear(*sizes, bias=False, stages=0, rank=rank, **placed)
    return SPMLinear(*sizes, bias=False, stages=STAGES, block=BLOCK, **placed)


if __name__ == "__main__":
    main()
