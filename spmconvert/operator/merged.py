"""The SPM operator as a few block-diagonal products: stages merged into blocks, tokens in cache-sized chunks.

A run of k stages is a block-diagonal matrix (``geometry.merge_groups``). Merging it costs O(width * block size * k),
independent of the number of tokens; after that the tokens only see one batched product a run. The diagonals go into the
blocks too, and so do ``expand`` and ``fold`` where the block grid divides the features: 768 -> 3072 multiplies each input
chunk by four stacked blocks instead of copying it, 3072 -> 768 sums rows of blocks instead of outputs.

Activations are kept tokens last inside a chunk: [.., rows, tokens]. With the weights on the left, the input of the first
group is a transposed view, the input of every further group of a two-group pass is a strided view, and the only copy is
the one that writes the output, which also adds the bias. Computing the groups with tokens first needs a second transpose.
Chunks keep both buffers near the cores, and are long enough for the products: at width 2048 chunks of 40 tokens take 1.3
times as long as chunks of 136.

Blocks are merged in float32 (or wider) and rounded once to the dtype of the activations.

In training only the inputs of the groups are kept, and the gradient goes through the merge to the stages. The chunked
backward is not differentiable a second time (the reference is, and so is a single chunk).

Tokens are chunked on a CPU only, and not under ``torch.compile``, ``torch.export``, ``torch.func`` and activation
checkpointing: there the same products are plain tensor operations, which a compiler can fuse, a transform can follow and a
checkpoint can forget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import linear, pad

from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.geometry import Geometry, MergeGroup, merge_groups
from spmconvert.operator.reference import apply_stages, expand, fold, is_recorded, is_transformed


@dataclass(frozen=True)
class MergePlan:
    """What the merged form of a geometry looks like; integers only.

    Attributes:
        geometry: shape of the layer.
        groups: runs of stages, in order.
        digits: sizes of the digits of the block index, most significant first; each group mixes one of them.
        input_tiles: copies of the input that the first group's blocks produce; 0 where ``expand`` runs by itself.
        output_rows: blocks the last group produces for each of its batches; 0 where ``fold`` runs by itself.
    """

    geometry: Geometry
    groups: tuple[MergeGroup, ...]
    digits: tuple[int, ...]
    input_tiles: int
    output_rows: int

    @cached_property
    def one_pass(self) -> bool:
        """Whether it is two groups of single coordinates, the first over the low digit, with no tiling or folding apart."""
        g = self.geometry
        whole = (g.in_features == g.width or self.input_tiles) and (g.out_features == g.width or self.output_rows)
        standard = len(self.groups) == len(self.digits) == 2 and self.groups[0].inner == self.groups[1].outer == 1
        return bool(whole and standard and g.block == 1 and self.groups[0].middle == self.digits[1])

    @property
    def dense(self) -> bool:
        """Whether all stages are one group, so that the merged form is an ordinary weight matrix."""
        return len(self.groups) == 1 and self.groups[0].outer == self.groups[0].inner == 1


def merge_plan(geometry: Geometry) -> MergePlan:
    """Plan the merged form of a geometry."""
    groups = tuple(merge_groups(geometry.blocks, geometry.stages))
    cuts = sorted({group.inner for group in groups} | {1})
    edges = [*cuts, geometry.blocks]
    digits = tuple(high // low for low, high in pairwise(edges))[::-1]
    tiles = rows = 0
    if len(groups) > 1:
        first, second, last = groups[0], groups[1], groups[-1]
        unit = first.middle * geometry.block
        whole_top = second.outer == 1 and second.middle == first.outer
        if geometry.in_features < geometry.width and geometry.in_features % unit == 0 and whole_top:
            tiles = -(-first.outer // (geometry.in_features // unit))
        unit = last.inner * geometry.block
        if geometry.out_features < geometry.width and geometry.out_features % unit == 0 and last.outer == 1:
            rows = geometry.out_features // unit
    return MergePlan(geometry, groups, digits, tiles, rows)


def merge_stages(weight: Tensor, scale_in: Tensor, scale_out: Tensor, plan: MergePlan) -> list[Tensor]:
    """Merge the stages and both diagonals into blocks; differentiable.

    Args:
        weight: stages, ``geometry.weight_shape()``.
        scale_in: [width].
        scale_out: [width].
        plan: merged form of a layer with at least one stage.

    Returns:
        One tensor [batches, rows, columns] for each group of the plan, float32 or wider; a dense plan
        gives the one matrix [out_features, in_features].
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, scale_in, scale_out = (p.to(dtype) for p in (weight, scale_in, scale_out))
    blocks = merge_groups_apart(weight, scale_in, scale_out, plan.geometry, plan.groups)
    return absorb_features(blocks, plan)


def merge_groups_apart(
    weight: Tensor, scale_in: Tensor, scale_out: Tensor, geometry: Geometry, groups: Sequence[MergeGroup]
) -> list[Tensor]:
    """Merge every group into square blocks [batches, size, size], diagonals into the first and last; differentiable.

    All tensors have the dtype of the blocks.
    """
    grid = (geometry.blocks, geometry.block, 1)
    blocks: list[Tensor] = []
    for position, group in enumerate(groups):
        probes = _probes(group, geometry.block, weight)
        if position == 0:
            probes = probes * scale_in.view(grid)
        response = apply_stages(probes, weight, geometry, group.first_stage, group.stages)
        if position == len(groups) - 1:
            response = response * scale_out.view(grid)
        size = group.middle * geometry.block
        response = response.reshape(group.outer, group.middle, group.inner, geometry.block, size)
        blocks.append(response.transpose(1, 2).reshape(group.outer * group.inner, size, size))
    return blocks


def absorb_features(blocks: list[Tensor], plan: MergePlan) -> list[Tensor]:
    """Put ``expand`` and ``fold`` into square blocks where the plan says so; the result of ``merge_stages``."""
    geometry = plan.geometry
    if plan.dense:
        return [_dense_weight(blocks[0][0], geometry)]
    blocks = list(blocks)
    if plan.input_tiles:
        blocks[0], blocks[1] = _absorb_expand(blocks[0], blocks[1], plan.input_tiles, geometry)
    if plan.output_rows:
        blocks[-1] = _absorb_fold(blocks[-1], plan, geometry.block)
    return [block.contiguous() for block in blocks]


def _probes(group: MergeGroup, block: int, like: Tensor) -> Tensor:
    """Unit vectors that are the same in every batch of the group: [blocks, block, middle * block]."""
    unit = torch.eye(group.middle * block, dtype=like.dtype, device=like.device)
    unit = unit.view(1, group.middle, 1, block, group.middle * block)
    return unit.expand(group.outer, -1, group.inner, -1, -1).reshape(-1, block, group.middle * block)


def _dense_weight(matrix: Tensor, geometry: Geometry) -> Tensor:
    rows = fold(matrix.t(), geometry.out_features).t()
    return fold(rows, geometry.in_features)


def _absorb_expand(first: Tensor, second: Tensor, tiles: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Stack the blocks that read the same input chunk; the second group's columns follow the new order.

    first [outer, size, size] -> [chunks, tiles * size, size]; second [inner, rows, outer * block] ->
    [inner, rows, chunks * tiles * block], with zero blocks where the last tile is not whole.
    """
    outer, size, _ = first.shape
    chunks = geometry.in_features // size
    missing = tiles * chunks - outer
    stacked = pad(first, (0, 0, 0, 0, 0, missing)).view(tiles, chunks, size, size).transpose(0, 1)
    inner, rows, _ = second.shape
    columns = pad(second, (0, missing * geometry.block)).view(inner, rows, tiles, chunks, geometry.block)
    return stacked.reshape(chunks, tiles * size, size), columns.transpose(2, 3).reshape(inner, rows, -1)


def _absorb_fold(last: Tensor, plan: MergePlan, block: int) -> Tensor:
    """Sum the rows that fold onto the same output: [inner, middle * block, columns] -> [inner, rows * block, columns]."""
    inner, rows, columns = last.shape
    kept = plan.output_rows * block
    return pad(last, (0, 0, 0, -rows % kept)).view(inner, -1, kept, columns).sum(1)


def _mix_group(h: Tensor, block_matrices: Tensor, group: MergeGroup, digit: int, *, expands: bool) -> Tensor:
    """Multiply one group's blocks into [*digits, block, tokens]; only the mixed digit changes its size."""
    # a tracer has sizes as tensors, also those that no input changes
    split = group.outer > 1 and int(h.shape[digit]) > group.middle
    if split:
        h = h.unflatten(digit, (-1, group.middle))
    mixed = digit + split
    moved = h.movedim(mixed, -3)
    others, (rows, block, tokens) = moved.shape[:-3], moved.shape[-3:]
    batches, size, _ = block_matrices.shape
    y = torch.bmm(block_matrices, moved.reshape(batches, rows * block, tokens))
    if expands:
        return y.view(batches * size // (group.middle * block), group.middle, block, tokens)
    y = y.view(*others, size // block, block, tokens).movedim(-3, mixed)
    return y.flatten(digit, mixed) if split else y


def _digit(group: MergeGroup, digits: tuple[int, ...]) -> int:
    """Position of the digit that a group mixes: the one whose place value is the group's ``inner``."""
    place_values = [math.prod(digits[position + 1 :]) for position in range(len(digits))]
    return place_values.index(group.inner)


def _mix(x: Tensor, blocks: Sequence[Tensor], plan: MergePlan) -> Tensor:
    """Send a chunk [tokens, in_features] through all groups; returns a strided view [tokens, coordinates...]."""
    digits = plan.digits
    if plan.input_tiles:
        digits = (plan.geometry.in_features // (plan.digits[1] * plan.geometry.block), plan.digits[1])
    else:
        x = expand(x, plan.geometry.width)
    h = x.reshape(x.shape[0], *digits, plan.geometry.block).movedim(0, -1)
    for position, (group, matrices) in enumerate(zip(plan.groups, blocks, strict=True)):
        expands = position == 0 and plan.input_tiles > 0
        h = _mix_group(h, matrices, group, _digit(group, plan.digits), expands=expands)
    return h.movedim(-1, 0)


def _fold_rest(h: Tensor, plan: MergePlan) -> Tensor:
    """Sum the outputs that the last group's blocks did not sum; h [tokens, coordinates...]."""
    if plan.output_rows or plan.geometry.width == plan.geometry.out_features:
        return h
    return fold(h.reshape(h.shape[0], plan.geometry.width), plan.geometry.out_features)


def apply_blocks(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, plan: MergePlan) -> Tensor:
    """Run merged blocks.

    Args:
        x: [tokens, in_features].
        blocks: as ``merge_stages`` gives them, in the dtype of x.
        bias: [out_features] in the dtype of x, or None.
        plan: merged form of the layer.

    Returns:
        [tokens, out_features] in the dtype of x.
    """
    if plan.dense:
        return linear(x, blocks[0], bias)
    whole = is_recorded() or x.device.type != "cpu" or x.shape[0] <= CHUNK_TOKENS
    if whole or _saved_through_hooks() or is_transformed():
        y = apply_whole(x, blocks, plan)
        return y if bias is None else y + bias
    chunked: Tensor = _ChunkedApply.apply(x, bias, plan, torch.is_grad_enabled(), *blocks)
    return chunked


def apply_whole(x: Tensor, blocks: Sequence[Tensor], plan: MergePlan) -> Tensor:
    """``apply_blocks`` of a plan that is not dense on all tokens at once, without a bias: products and views alone."""
    return _fold_rest(_mix(x, blocks, plan), plan).reshape(x.shape[0], plan.geometry.out_features).contiguous()


def _write_pass(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, plan: MergePlan, y: Tensor) -> None:
    """``write_blocks`` of one pass of single coordinates in two groups, in as few operations as there can be.

    A call with one token is made of little else than them. The second product reads every low digit's rows of the first
    one's output where they are, one in ``low`` of them.
    """
    tokens, (high, low) = x.shape[0], plan.digits
    first, second = blocks
    h = torch.bmm(first, x.view(tokens, first.shape[0], low).permute(1, 2, 0))
    rows = h.as_strided((low, second.shape[2], tokens), (tokens, low * tokens, 1))
    mixed = torch.bmm(second, rows).permute(2, 1, 0)
    target = y.view(tokens, plan.output_rows or high, low)
    if bias is None:
        target.copy_(mixed)
    else:
        torch.add(mixed, bias.view(target.shape[1:]), out=target)


def write_blocks(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, plan: MergePlan, y: Tensor) -> None:
    """Run merged blocks on a chunk of tokens and write over y, without gradients; arguments as for ``apply_blocks``."""
    if plan.dense:
        weight = blocks[0].t()
        torch.mm(x, weight, out=y) if bias is None else torch.addmm(bias, x, weight, out=y)
    elif plan.one_pass and x.is_contiguous():
        _write_pass(x, blocks, bias, plan, y)
    else:
        _write(_fold_rest(_mix(x, blocks, plan), plan), bias, y)


def _saved_through_hooks() -> bool:
    """Whether what autograd saves goes through hooks, as under activation checkpointing.

    Each chunk's own graph would call them by itself: a checkpointed region would be computed again for every chunk.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _ChunkedApply(torch.autograd.Function):
    """All chunks in one node, each writing its slice of the output and of the input's gradient.

    The graph of every chunk is kept, without its output: that is its groups' inputs. Splitting and concatenating by
    ordinary operations instead copies outputs and gradients once more, and takes 1.8 times as long at width 1024.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, plan: MergePlan, recorded: bool, *blocks: Tensor) -> Tensor:
        """Run every chunk; x [tokens, in_features] -> [tokens, out_features].

        ``recorded`` is whether gradients are: under ``torch.no_grad`` the inputs are still said to need some.
        """
        ctx.in_features, ctx.graphs = x.shape[1], []
        ctx.blocks = [
            block.detach().requires_grad_(needed) for block, needed in zip(blocks, ctx.needs_input_grad[4:], strict=True)
        ]
        y = x.new_empty(x.shape[0], plan.geometry.out_features)
        for chunk, target in zip(x.split(CHUNK_TOKENS), y.split(CHUNK_TOKENS), strict=True):
            leaf = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(recorded):
                h = _fold_rest(_mix(leaf, ctx.blocks, plan), plan)
            _write(h.detach(), bias, target)
            if h.requires_grad:
                # without its values, which nothing reads any more
                ctx.graphs.append((leaf, get_gradient_edge(h), torch.empty_like(h, device="meta")))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run every chunk's graph backwards; the blocks' gradients are added up in float32 or wider and rounded once."""
        (grad,) = grads
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        grad_x = grad.new_empty(grad.shape[0], ctx.in_features) if needs_x else None
        trained = [block for block in ctx.blocks if block.requires_grad]
        sums = [torch.zeros_like(block, dtype=torch.promote_types(block.dtype, torch.float32)) for block in trained]
        for index, (leaf, edge, like) in enumerate(ctx.graphs):
            rows = slice(index * CHUNK_TOKENS, index * CHUNK_TOKENS + leaf.shape[0])
            inputs = [*trained, leaf] if needs_x else trained
            # in the strides of the output the batched products read it as it is; otherwise they copy it batch by batch
            grad_h = torch.empty_like(like, device=grad.device).copy_(grad[rows].view(like.shape))
            chunk_grads = torch.autograd.grad(edge, inputs, grad_h, retain_graph=True)
            for total, part in zip(sums, chunk_grads, strict=False):
                total.add_(part)
            if grad_x is not None:
                grad_x[rows] = chunk_grads[-1]
        totals = iter(sums)
        grad_blocks = [next(totals).to(block.dtype) if block.requires_grad else None for block in ctx.blocks]
        return grad_x, grad.sum(0) if needs_bias else None, None, None, *grad_blocks


def _write(h: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Copy the strided output of a chunk into place; adding the bias costs nothing extra here."""
    if bias is None:
        target.view(h.shape).copy_(h)
    else:
        torch.add(h, bias.detach().view(h.shape[1:]), out=target.view(h.shape))


def merged_forward(
    x: Tensor, weight: Tensor, scale_in: Tensor, scale_out: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Merge and run: x [tokens, in_features] -> [tokens, out_features]; differentiable in every tensor."""
    plan = merge_plan(geometry)
    blocks = [block.to(x.dtype) for block in merge_stages(weight, scale_in, scale_out, plan)]
    return apply_blocks(x, blocks, bias, plan)
