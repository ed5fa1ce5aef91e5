"""The operator as an explicit matrix, built entry by entry from the definition and from nothing in the package."""

import math

import torch


def stage_matrix(weight, stage, blocks, block, variant):
    """One stage as a matrix [blocks * block, blocks * block]."""
    period = max(1, math.ceil(math.log2(blocks))) if blocks > 1 else 1
    stride = 2 ** (stage % period)
    matrix = torch.zeros(blocks * block, blocks * block, dtype=weight.dtype)
    pair = 0
    for i in range(blocks):
        partner = i ^ stride
        rows = slice(i * block, (i + 1) * block)
        if variant == "general":
            matrix[rows, rows] = weight[stage, 0, i]
            if partner < blocks:
                matrix[rows, slice(partner * block, (partner + 1) * block)] = weight[stage, 1, i]
        elif partner >= blocks:
            matrix[i, i] = 1
        elif i < partner:
            cos, sin = torch.cos(weight[stage, 0, pair]), torch.sin(weight[stage, 0, pair])
            matrix[i, i], matrix[i, partner] = cos, -sin
            matrix[partner, i], matrix[partner, partner] = sin, cos
            pair += 1
    return matrix


def operator_matrix(weight, scale_in, scale_out, geometry):
    """fold · D_out · B_L ··· B_1 · D_in · expand as a matrix [out_features, in_features]."""
    n = geometry.width
    expand = torch.zeros(n, geometry.in_features, dtype=weight.dtype)
    fold = torch.zeros(geometry.out_features, n, dtype=weight.dtype)
    for i in range(n):
        expand[i, i % geometry.in_features] = 1
        fold[i % geometry.out_features, i] = 1
    product = torch.diag(scale_in) @ expand
    for stage in range(geometry.stages):
        product = stage_matrix(weight, stage, n // geometry.block, geometry.block, geometry.variant) @ product
    return fold @ torch.diag(scale_out) @ product


def random_parameters(geometry, seed=0, dtype=torch.double):
    """Stages and diagonals of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    size = 1.0 if geometry.variant == "rotation" else (2 * geometry.block) ** -0.5
    weight = torch.randn(geometry.weight_shape(), generator=generator, dtype=torch.double) * size
    scales = 1 + 0.3 * torch.randn(2, geometry.width, generator=generator, dtype=torch.double)
    return weight.to(dtype), scales[0].to(dtype), scales[1].to(dtype)
