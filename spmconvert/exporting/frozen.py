"""Layers as a graph is to have them: everything that follows from weights alone is worked out before it is recorded.

A program that runs a graph computes all of it at every call. So stages are merged into their blocks and 2:4 weights stand
at their places in a matrix; what is left of a layer are its products. Where a CPU would run the whole layer as one dense
product, it is one ``nn.Linear``. What it gives up: merged blocks and matrices take more bytes than what they are made of.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.model.swap import dense_layer, replace_module
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import apply_whole, merge_stages
from spmconvert.operator.plain import PlainLayer
from spmconvert.operator.terms.spm import StagesModule


class MergedStages(nn.Module):
    """Stages that are merged for good.

    Args:
        stages: the term; at least one stage, in several groups.
    """

    def __init__(self, stages: StagesModule) -> None:
        super().__init__()
        self.plan = stages.plan
        blocks = merge_stages(stages.weight, stages.scale_in, stages.scale_out, stages.plan)
        for index, block in enumerate(blocks):
            self.register_buffer(f"block_{index}", block.to(stages.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X [tokens, in_features] -> [tokens, out_features]."""
        return apply_whole(x, list(self.buffers()), self.plan)


@torch.no_grad()
def freeze_(model: nn.Module) -> Any:
    """Put layers of products in the place of all SPM layers, in place; the model is returned."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SPMLinear):
            replace_module(model, name, _frozen(layer))
    return model.eval().requires_grad_(False)


def _frozen(layer: SPMLinear) -> nn.Module:
    if layer.design.runs_dense:
        return dense_layer(layer, conv1d=False, dtype=layer.weight.dtype)
    terms: dict[str, nn.Module] = {}
    for term in layer.term_modules:
        terms[term.term.kind] = _merged(term) if isinstance(term, StagesModule) and term.geometry.stages else term
    frozen = PlainLayer(layer.in_features, layer.out_features, layer.held_bias is not None, terms, layer.weight.dtype)
    if frozen.bias is not None and layer.bias is not None:
        frozen.bias = nn.Parameter(layer.bias.detach())
    return frozen


def _merged(term: StagesModule) -> nn.Module:
    if not term.plan.dense:
        return MergedStages(term)
    (merged,) = merge_stages(term.weight, term.scale_in, term.scale_out, term.plan)
    linear = nn.Linear(term.geometry.in_features, term.geometry.out_features, bias=False)
    linear.weight = nn.Parameter(merged.to(term.weight.dtype))
    return linear
