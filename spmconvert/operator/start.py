"""Where a fit starts: random rotations, or the hierarchical factorisation where the layer can be a plain butterfly.

Hierarchical factorisation (Le, Zheng, Riccietti, Gribonval 2022) peels one stage after the other off a square matrix:
for a fixed block of inputs and a fixed low bit of the output, what is left is a matrix of rank ``block``, so a truncated
SVD of that slice gives the stage. It recovers a matrix that is such a product exactly. Left to right and with orthonormal
rows, as here, it is also the stable order on noisy targets. It ignores the covariance and needs one pass of general stages
and in_features = out_features = width; everywhere else the start is random.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from spmconvert.operator.geometry import Geometry, stage_period


class StagedLayer(Protocol):
    """Whoever holds the parameters of stages."""

    geometry: Geometry
    weight: nn.Parameter
    scale_in: nn.Parameter
    scale_out: nn.Parameter


def random_start_(layer: StagedLayer, seed: int) -> None:
    """Fill the layer in place with random rotations and unit diagonals, the same for the same seed on any machine."""
    generator = torch.Generator().manual_seed(seed)
    geometry = layer.geometry
    with torch.no_grad():
        shape = geometry.weight_shape()
        if geometry.variant == "rotation":
            layer.weight.copy_((torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * torch.pi)
        elif geometry.block == 1:
            angles = (torch.rand((shape[0], *shape[2:]), generator=generator, dtype=torch.float32) * 2 - 1) * torch.pi
            layer.weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
        else:
            layer.weight.copy_(torch.randn(shape, generator=generator, dtype=torch.float32) * (2 * geometry.block) ** -0.5)
        layer.scale_in.fill_(1.0)
        layer.scale_out.fill_(1.0)


def can_factorise(geometry: Geometry) -> bool:
    """Whether the hierarchical factorisation applies to a layer."""
    square = geometry.in_features == geometry.out_features == geometry.width
    return square and geometry.variant == "general" and geometry.stages >= stage_period(geometry.blocks)


def hierarchical_start_(layer: StagedLayer, weight: Tensor) -> None:
    """Factorise weight [width, width] into the layer's first pass of stages, in place; further stages are the identity.

    Only for layers that ``can_factorise`` accepts.
    """
    geometry, block = layer.geometry, layer.geometry.block
    period = stage_period(geometry.blocks)
    with torch.no_grad():
        identity_stages_(layer, 0)
        layer.scale_in.fill_(1.0)
        layer.scale_out.fill_(1.0)
        size = 1 << period
        rest = weight.new_zeros(size, block, size, block, dtype=torch.float64)
        grid = (geometry.blocks, block, geometry.blocks, block)
        rest[: geometry.blocks, :, : geometry.blocks] = weight.double().view(grid)
        # leading dimension: the low bits of the output that are settled; then [out, block, in, block]
        rest = rest.unsqueeze(0)
        for stage in range(period):
            own, other, rest = _peel(rest)
            layer.weight[stage, 0] = own[: geometry.blocks].to(layer.weight.dtype)
            layer.weight[stage, 1] = other[: geometry.blocks].to(layer.weight.dtype)
        remainder = rest.reshape(size, block, block)[: geometry.blocks].to(layer.weight.dtype)
        layer.weight[period - 1] = remainder @ layer.weight[period - 1]


def identity_stages_(layer: StagedLayer, first: int) -> None:
    """Make all stages from ``first`` on the identity, in place."""
    with torch.no_grad():
        layer.weight[first:] = 0
        if layer.geometry.variant == "general":
            layer.weight[first:, 0] = torch.eye(layer.geometry.block, dtype=layer.weight.dtype)


def _peel(rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the stage of the lowest remaining bit off.

    Args:
        rest: [low, out, block, in, block], float64; ``low`` counts settled output bits in place of the input's.

    Returns:
        own and other mixers of the stage, each [blocks, block, block] in coordinate order, and what remains,
        [2 low, out / 2, block, in / 2, block].
    """
    low, out, block, _, _ = rest.shape
    half = out // 2
    # slices[low, out bit, in rest]: [out rest * block, in bit * block] of rank block
    slices = rest.view(low, half, 2, block, half, 2, block).permute(0, 2, 4, 1, 3, 5, 6)
    slices = slices.reshape(low, 2, half, half * block, 2 * block)
    gram = slices.transpose(-1, -2) @ slices
    rows = torch.linalg.eigh(gram)[1][..., -block:].transpose(-1, -2)
    left = slices @ rows.transpose(-1, -2)
    remaining = left.view(low, 2, half, half, block, block).permute(1, 0, 3, 4, 2, 5)
    remaining = remaining.reshape(2 * low, half, block, half, block)
    # mixer of the coordinate with bits (rest, bit, low): own columns at its own bit, other columns at the flipped one
    mixers = rows.view(low, 2, half, block, 2, block)
    own = torch.stack([mixers[:, bit, :, :, bit] for bit in (0, 1)], dim=1)
    other = torch.stack([mixers[:, bit, :, :, 1 - bit] for bit in (0, 1)], dim=1)
    order = (2, 1, 0, 3, 4)
    return own.permute(order).reshape(-1, block, block), other.permute(order).reshape(-1, block, block), remaining
