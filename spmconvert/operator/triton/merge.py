"""Merging stages into blocks by Triton kernels, as ``torch.library`` operators with gradients.

The same blocks as ``merged.merge_stages``, in one launch a group instead of about ten a stage. In training that is done
at every step, and the launches would be many for what little they compute.

What it gives up: it merges the general variant with single coordinates, in float32, in groups of up to
``tiles.MERGED_SIDE``; every other layer is merged by ``merged.merge_stages``. A second derivative is computed there too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spmconvert.operator.geometry import Geometry, MergeGroup
from spmconvert.operator.merged import MergePlan, absorb_features, merge_groups_apart, merge_stages
from spmconvert.operator.triton import tiles
from spmconvert.operator.triton.launches import launch
from spmconvert.operator.triton.refusals import refuse_batched_gradients, refuse_transforms


def merge_stages_triton(weight: Tensor, scale_in: Tensor, scale_out: Tensor, plan: MergePlan) -> list[Tensor]:
    """Merge the stages and both diagonals into blocks; the arguments and the result of ``merged.merge_stages``.

    Raises:
        BackendError: under a transform.
    """
    refuse_transforms()
    geometry = plan.geometry
    single = geometry.variant == "general" and geometry.block == 1 and weight.dtype != torch.float64
    if not single or max(group.middle for group in plan.groups) > tiles.MERGED_SIDE:
        return merge_stages(weight, scale_in, scale_out, plan)
    numbers = [n for g in plan.groups for n in (g.first_stage, g.stages, g.outer, g.middle, g.inner)]
    stages = weight.float().view(geometry.stages, 2, geometry.width)
    return absorb_features(merge(stages, scale_in.float(), scale_out.float(), numbers), plan)


@torch.library.custom_op("spmconvert::merge", mutates_args=())
def merge(weight: Tensor, scale_in: Tensor, scale_out: Tensor, groups: Sequence[int]) -> list[Tensor]:
    """Merge every group into square blocks.

    Args:
        weight: stages of the general variant, [stages, 2, width], float32.
        scale_in: diagonal before the first group, [width], float32.
        scale_out: diagonal after the last group, [width], float32.
        groups: the five numbers of each ``MergeGroup``, one group after the other.

    Returns:
        [batches, middle, middle] for each group, float32.
    """
    weight, scale_in, scale_out = weight.contiguous(), scale_in.contiguous(), scale_out.contiguous()
    parsed = _groups(groups)
    merged = []
    for index, group in enumerate(parsed):
        batches = group.outer * group.inner
        blocks = weight.new_empty(batches, group.middle, group.middle)
        arguments = {
            "weight": weight,
            "scale_in": scale_in if index == 0 else None,
            "scale_out": scale_out if index == len(parsed) - 1 else None,
            "blocks": blocks,
        }
        tile = tiles.merge_tile(group.middle)
        grid = (batches, tiles.count(group.middle, tile.columns))
        launch("merge_kernel", grid, arguments, _constants(group, tile, weight), tile)
        merged.append(blocks)
    return merged


@torch.library.custom_op("spmconvert::merge_backward", mutates_args=())
def merge_backward(
    grads: Sequence[Tensor], weight: Tensor, scale_in: Tensor, scale_out: Tensor, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale_in and scale_out from those of the blocks; arguments as in ``merge``."""
    weight, scale_in, scale_out = weight.contiguous(), scale_in.contiguous(), scale_out.contiguous()
    parsed = _groups(groups)
    shares = max(tiles.count(group.middle, tiles.merge_tile(group.middle).columns) for group in parsed)
    # a group with fewer tiles of columns than the largest leaves parts untouched
    parts = [torch.zeros(shares, *p.shape, dtype=p.dtype, device=p.device) for p in (weight, scale_in, scale_out)]
    for index, (group, grad) in enumerate(zip(parsed, grads, strict=True)):
        arguments = {
            "grad": grad.contiguous(),
            "weight": weight,
            "scale_in": scale_in if index == 0 else None,
            "scale_out": scale_out if index == len(parsed) - 1 else None,
            "grad_weight": parts[0],
            "grad_in": parts[1],
            "grad_out": parts[2],
            "all_stages": weight.shape[0],
        }
        tile = tiles.merge_tile(group.middle)
        grid = (group.outer * group.inner, tiles.count(group.middle, tile.columns))
        launch("merge_gradient_kernel", grid, arguments, _constants(group, tile, weight), tile)
    grad_weight, grad_in, grad_out = (part.sum(0) for part in parts)
    return grad_weight, grad_in, grad_out


def _constants(group: MergeGroup, tile: tiles.Tile, weight: Tensor) -> dict[str, int]:
    sizes = {"SIDE": tile.rows, "TILE": tile.columns, "MIDDLE": group.middle, "INNER": group.inner}
    return {"FIRST": group.first_stage, "STAGES": group.stages, "WIDTH": weight.shape[2], **sizes}


def _groups(numbers: Sequence[int]) -> list[MergeGroup]:
    return [MergeGroup(*numbers[start : start + 5]) for start in range(0, len(numbers), 5)]


@merge.register_fake
def _(weight: Tensor, scale_in: Tensor, scale_out: Tensor, groups: Sequence[int]) -> list[Tensor]:
    return [weight.new_empty(g.outer * g.inner, g.middle, g.middle) for g in _groups(groups)]


@merge_backward.register_fake
def _(
    grads: Sequence[Tensor], weight: Tensor, scale_in: Tensor, scale_out: Tensor, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_in, grad_out = (p.new_empty(p.shape) for p in (weight, scale_in, scale_out))
    return grad_weight, grad_in, grad_out


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return (*merge_backward(grads, *tensors, ctx.groups), None)
    weight, scale_in, scale_out = tensors
    stages, _, width = weight.shape
    blocks = merge_groups_apart(
        weight.view(stages, 2, width, 1, 1), scale_in, scale_out, Geometry(width, width, width, stages), _groups(ctx.groups)
    )
    wanted = [p for p, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    gradients = iter(torch.autograd.grad(blocks, wanted, grads, create_graph=True))
    return (*(next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]), None)


merge.register_autograd(_backward, setup_context=_save)
merge_backward.register_vmap(refuse_batched_gradients)
