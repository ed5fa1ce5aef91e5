"""Folding a product of two factors into the low-rank term of a layer, and taking it out again.

A trained adapter beside a layer is such a product, and a sum of two low ranks is a low rank of both together, so that the
layer takes it in exactly, whatever its other terms are. They are shared by both forms of the layer; the low-rank term is a
new one. The ranks that were there come first, bit for bit, so that the way back is to keep the first ones.

What it gives up: nothing is truncated. A layer whose low rank would exceed the rank of its matrix is refused, since the
dense layer would then be smaller.
"""

import torch
from torch import Tensor, nn

from spmconvert.errors import UnsupportedLayerError
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank, LowRankModule

# both factors [out_features, rank] and [rank, in_features]
Factors = tuple[Tensor, Tensor]


@torch.no_grad()
def folded(layer: SPMLinear, left: Tensor, right: Tensor) -> SPMLinear:
    """A layer that computes what this one does plus ``left @ right``.

    Args:
        layer: it shares its tensors with the result, but for those of the low-rank term.
        left: [out_features, rank] of any floating dtype; the result has that of the layer.
        right: [rank, in_features].

    Raises:
        UnsupportedLayerError: when the sum of both ranks is more than the matrix can have, when a tensor of the layer is
            not in memory, or when its low-rank term is no longer two plain ``nn.Linear``.
    """
    added, held = right.shape[0], rank_of(layer)
    smallest = min(layer.in_features, layer.out_features)
    if held + added > smallest:
        raise UnsupportedLayerError(
            f"rank {added} beside low rank {held} is rank {held + added}; a matrix of {layer.in_features} x "
            f"{layer.out_features} has {smallest} at most: keep the adapter beside the layer, or train one of a lower rank"
        )
    kept = _factors(layer)
    device, dtype = layer.weight.device, layer.weight.dtype
    term = LowRank(layer.in_features, layer.out_features, added)
    own = LowRankModule(term, bias=False, device=device, dtype=torch.promote_types(dtype, torch.float32))
    own.set_factors_(left.to(device), right.to(device))
    up, down = own.up.weight.to(dtype), own.down.weight.to(dtype)
    return _with_factors(layer, (torch.cat([kept[0], up], dim=1), torch.cat([kept[1], down])))


@torch.no_grad()
def unfolded(layer: SPMLinear, rank: int) -> SPMLinear:
    """The layer with the first ``rank`` ranks of its low-rank term alone; 0 takes the term away.

    Raises:
        UnsupportedLayerError: when a tensor of the layer is not in memory.
    """
    up, down = _factors(layer)
    return _with_factors(layer, (up[:, :rank].clone(), down[:rank].clone()))


def rank_of(layer: SPMLinear) -> int:
    """Rank of a layer's low-rank term, 0 where it has none."""
    return 0 if layer.low_rank is None else layer.low_rank.term.rank


def _factors(layer: SPMLinear) -> Factors:
    """Both weights of the low-rank term, of rank 0 where there is none."""
    if any(tensor.is_meta for tensor in layer.state_dict(keep_vars=True).values()):
        raise UnsupportedLayerError("tensors of the layer are not in memory; load the model without offloading")
    low_rank = layer.low_rank
    if low_rank is None:
        empty = layer.weight.new_empty
        return empty(layer.out_features, 0), empty(0, layer.in_features)
    plain = low_rank.is_plain and all(type(part.weight) is nn.Parameter for part in (low_rank.up, low_rank.down))
    if not plain:
        raise UnsupportedLayerError(
            "its low-rank term is no longer two plain nn.Linear (an adapter of its own, or quantised weights); merge or "
            "unload that first"
        )
    return low_rank.up.weight, low_rank.down.weight


def _with_factors(layer: SPMLinear, factors: Factors) -> SPMLinear:
    """The layer with a low-rank term of these weights in the place of its own; without one where they have no rank."""
    up, down = factors
    rank, bias = down.shape[0], layer.held_bias
    terms = [term for term in layer.design.terms if term.kind != LowRank.kind]
    terms += [LowRank(layer.in_features, layer.out_features, rank)] if rank else []
    # its random start is written over; other terms move in with their tensors, so theirs costs no memory
    built = SPMLinear(layer.in_features, layer.out_features, bias is not None, terms=terms, device="meta")
    built.weight = layer.weight
    for term in layer.term_modules:
        if term is not layer.low_rank:
            built.add_module(term.term.kind, term)
    low_rank = built.low_rank
    if low_rank is None:
        built.bias = bias
    else:
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        low_rank.up.weight, low_rank.down.weight = nn.Parameter(up, trained), nn.Parameter(down, trained)
        low_rank.up.bias = bias  # type: ignore[assignment]
    return built.train(layer.training)
