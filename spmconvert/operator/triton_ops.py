"""The Triton backend as ``torch.library`` operators: what is launched for a layer, forward and backward.

``torch.compile`` and ``torch.export`` see two opaque operators with known output shapes, so they neither break nor trace
the launches. ``mix`` runs all passes of a layer over its tokens; ``mix_backward`` runs the transposed passes for the
gradient of the input, and sums output gradient times input over the tokens for the gradient of the blocks. The tokens are
split over programs that each write a part of their own, and the parts are added afterwards: two steps instead of atomic
additions, so results are the same in every run. From the blocks to the stages the gradient goes through ``merge_stages``.

Launches: up to ``tiles.FEW_TOKENS`` tokens every pass is one launch of a kernel without padding; two passes over rows of
up to ``tiles.FUSED_WIDTH`` coordinates run in one launch; otherwise a pass is a launch. All sizes follow from shapes, so a
launch sequence can be captured in a CUDA graph: no host synchronisation, no autotuning, no data-dependent allocation.
What remains of ``expand`` and ``fold`` is done by loads modulo the features and by a narrow second output that is added
at the end.

What it gives up: float64 and integers are refused; columns of a row have to lie side by side, other inputs are copied; a
second derivative is computed by the plain PyTorch form; ``torch.vmap`` is refused, because the tokens are the batch.
A dense plan has no passes, and its one matrix product is left to ``torch.nn.functional.linear``.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from spmconvert.errors import BackendError
from spmconvert.operator import tiles
from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.merged import MergePlan
from spmconvert.operator.reference import expand, fold
from spmconvert.operator.tiles import Pass, Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# offsets inside a tile are 32-bit; rows further apart than this are copied together first
LARGEST_ROW_STRIDE = 1 << 24
# multiprocessors that the interpreter, which has none, shares tokens out to: few enough to run loops, enough to split
INTERPRETED_MULTIPROCESSORS = 2


@cache
def _kernels() -> ModuleType:
    # importing Triton is slow, and the package works without it
    from spmconvert.operator import kernels

    return kernels


def apply_blocks_triton(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, plan: MergePlan) -> Tensor:
    """Run merged blocks; the arguments and the result of ``merged.apply_blocks``.

    Raises:
        BackendError: when the dtype is not float32, float16 or bfloat16.
    """
    if x.dtype not in DTYPES:
        raise BackendError(
            f"backend triton computes in float32, float16 and bfloat16, the input is {str(x.dtype).removeprefix('torch.')}; "
            "convert it, or use merged or reference"
        )
    if plan.dense:
        return linear(x, blocks[0], bias)
    shape = [plan.geometry.in_features, plan.geometry.out_features, plan.geometry.block]
    keep = torch.is_grad_enabled() and any(block.requires_grad for block in blocks)
    y, *_ = mix(x, list(blocks), bias, [*shape, *(group.inner for group in plan.groups)], keep)
    return y


@torch.library.custom_op("spmconvert::mix", mutates_args=())
def mix(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, shape: Sequence[int], keep: bool) -> list[Tensor]:
    """Send tokens through all passes.

    Args:
        x: [tokens, in_features].
        blocks: [batches, rows, columns] for each pass, in the dtype of x.
        bias: [out_features] in the dtype of x, or None.
        shape: in_features, out_features, block, and ``inner`` of each pass.
        keep: also return the inputs of all passes after the first.

    Returns:
        [tokens, out_features] and, if kept, [tokens, coordinates] for each further pass.
    """
    passes = _passes(blocks, shape)
    y, hidden = _run(x, list(blocks), bias, passes, shape[1], keep=keep, transposed=False)
    return [y, *hidden] if keep else [y]


@torch.library.custom_op("spmconvert::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor,
    x: Tensor,
    blocks: Sequence[Tensor],
    hidden: Sequence[Tensor],
    shape: Sequence[int],
    needs_x: bool,
    needs_blocks: bool,
) -> list[Tensor]:
    """Gradients of the input and of the blocks.

    Args:
        grad: gradient of the output, [tokens, out_features].
        x: [tokens, in_features].
        blocks: as in ``mix``.
        hidden: inputs of all passes after the first; empty unless needs_blocks.
        shape: as in ``mix``.
        needs_x: whether the gradient of x is wanted.
        needs_blocks: whether the gradients of the blocks are wanted.

    Returns:
        The gradient of x, if wanted, then those of the blocks, if wanted.
    """
    passes = _passes(blocks, shape)
    back = [p.transposed for p in passes][::-1]
    used = len(back) if needs_x else len(back) - 1
    target = shape[0] if needs_x else passes[0].batches * passes[0].rows
    grads = [grad]
    if used:
        found, between = _run(
            grad, blocks[::-1][:used], None, back[:used], target, keep=needs_blocks, transposed=True
        )
        grads += [*between, found]
    results = [grads[-1]] if needs_x else []
    if needs_blocks:
        inputs = [x, *hidden]
        for index, (p, block) in enumerate(zip(passes, blocks, strict=True)):
            results.append(_block_gradient(grads[len(passes) - 1 - index], inputs[index], p, block.dtype))
    return results


def _passes(blocks: Sequence[Tensor], shape: Sequence[int]) -> list[Pass]:
    sizes = ((*block.shape, inner) for block, inner in zip(blocks, shape[3:], strict=True))
    return [Pass(batches, columns, rows, inner, shape[2]) for batches, rows, columns, inner in sizes]


def _run(
    x: Tensor,
    blocks: Sequence[Tensor],
    bias: Tensor | None,
    passes: list[Pass],
    target: int,
    *,
    keep: bool,
    transposed: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All passes in order, in as few launches as fit: the output, and the activations between passes if kept."""
    widths = [p.batches * p.rows for p in passes]
    x, y = _rows(x), x.new_empty(x.shape[0], target)
    tail = x.new_empty(x.shape[0], widths[-1] - target)
    kept: list[Tensor] = []
    index = 0
    while index < len(passes) and x.shape[0]:
        pair = index + 1 < len(passes) and tiles.fuses(passes[index], passes[index + 1], x.shape[0])
        last = index + 1 + pair == len(passes)
        width = widths[index + pair]
        out, rest = (y, tail) if last else (x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], 0))
        job = _Job(x, out, rest, bias if last else None, transposed)
        if pair:
            kept += _launch_fused(job, blocks[index : index + 2], passes[index : index + 2], keep=keep)
        elif not transposed and tiles.has_few_tokens(x.shape[0], passes):
            _launch_few(job, blocks[index], passes[index])
        else:
            _launch_mix(job, blocks[index], passes[index])
        kept += [] if last or not keep else [out]
        x = out
        index += 1 + pair
    if not x.shape[0] and keep:
        kept = [x.new_empty(0, width) for width in widths[:-1]]
    for first in range(0, tail.shape[1], target):
        part = tail[:, first : first + target]
        y[:, : part.shape[1]] += part
    return y, kept


def _block_gradient(grad: Tensor, x: Tensor, p: Pass, dtype: torch.dtype) -> Tensor:
    """Output gradient times input, summed over tokens: [batches, rows, columns]."""
    grad, x = _rows(grad), _rows(x)
    tile = tiles.choose_tile("gradient", p, x.element_size())
    items = (
        tiles.count(p.batches, tile.batches) * tiles.count(p.rows, tile.rows) * tiles.count(p.columns, tile.columns)
    )
    shares = tiles.token_shares(items, tiles.count(x.shape[0], tile.tokens), _multiprocessors(x))
    parts = x.new_empty(shares, p.batches, p.rows, p.columns, dtype=torch.float32)
    if not x.shape[0]:
        return parts.zero_()[0].to(dtype)
    arguments = {"grad": grad, "x": x, "parts": parts, "tokens": x.shape[0]}
    arguments |= {"grad_stride": grad.stride(0), "x_stride": x.stride(0)}
    constants = {"PASS": tuple(p), "TILE": tile.sizes, "SOURCE": x.shape[1], "TARGET": grad.shape[1], **_arithmetic(x)}
    launch("block_gradient_kernel", (items, shares), arguments, constants, tile)
    return (parts[0] if shares == 1 else parts.sum(0)).to(dtype)


class _Job(NamedTuple):
    """What one launch reads and writes."""

    x: Tensor
    y: Tensor
    tail: Tensor
    bias: Tensor | None
    transposed: bool

    def arguments(self) -> dict[str, Any]:
        """Arguments that the forward kernels share."""
        strides = {"x_stride": self.x.stride(0), "y_stride": self.y.stride(0), "tail_stride": self.tail.stride(0)}
        return {"x": self.x, "bias": self.bias, "y": self.y, "tail": self.tail, **strides}

    def features(self) -> dict[str, int]:
        """Constants that the forward kernels share."""
        return {"SOURCE": self.x.shape[1], "TARGET": self.y.shape[1]}


def _launch_few(job: _Job, w: Tensor, p: Pass) -> None:
    tile = tiles.few_tokens_tile(p)
    items = tiles.count(p.batches, tile.batches) * tiles.count(p.rows, tile.rows)
    constants = {"PASS": tuple(p), "TILE": tile.sizes, **job.features()}
    launch("few_tokens_kernel", (items, job.x.shape[0]), {**job.arguments(), "w": w}, constants, tile)


def _launch_mix(job: _Job, w: Tensor, p: Pass) -> None:
    x = job.x
    tile = tiles.choose_tile("mix", p, x.element_size())
    items = tiles.count(p.batches, tile.batches) * tiles.count(p.rows, tile.rows)
    shares = tiles.token_shares(items, tiles.count(x.shape[0], tile.tokens), _multiprocessors(x))
    constants = {"PASS": tuple(p), "TILE": tile.sizes, **job.features(), "TRANSPOSED": job.transposed, **_arithmetic(x)}
    launch("mix_kernel", (items, shares), {**job.arguments(), "w": w, "tokens": x.shape[0]}, constants, tile)


def _launch_fused(job: _Job, blocks: Sequence[Tensor], pair: Sequence[Pass], *, keep: bool) -> list[Tensor]:
    """Two passes in one launch; returns the activations between them if they are kept."""
    x, (first, second) = job.x, pair
    tile, next_tile = (tiles.choose_tile("fused", p, x.element_size()) for p in pair)
    token_tiles = tiles.count(x.shape[0], tile.tokens)
    programs = min(token_tiles, tiles.PROGRAMS * _multiprocessors(x))
    width = first.batches * first.rows
    hidden = x.new_empty(x.shape[0] if keep else programs * tile.tokens, width)
    arguments = {**job.arguments(), "w": blocks[0], "next_w": blocks[1], "hidden": hidden, "tokens": x.shape[0]}
    constants = {"PASS": tuple(first), "NEXT_PASS": tuple(second), "TILE": tile.sizes, "NEXT_TILE": next_tile.sizes}
    constants |= {**job.features(), "HIDDEN": width, "KEEP": keep, "TRANSPOSED": job.transposed, **_arithmetic(x)}
    launch("fused_kernel", (programs,), arguments, constants, tile)
    return [hidden] if keep else []


def launch(
    kernel: str, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], tile: Tile
) -> None:
    """Launch a kernel of ``kernels`` on the device of its tensors."""
    function = getattr(_kernels(), kernel)
    # multiply-adds are fused as they always were; saying so keeps Triton from warning that its default will change
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(arguments["x"]):
        function[grid](**arguments, **constants, **options)


def _arithmetic(x: Tensor) -> dict[str, Any]:
    """How products are computed: float32 as PyTorch's own setting says, bfloat16 in float32 where it is interpreted."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": "ieee" if exact else "tf32", "UPCAST": interprets_triton() and x.dtype == torch.bfloat16}


def _multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def _rows(x: Tensor) -> Tensor:
    """The same numbers, with the columns of a row side by side and offsets between rows in range."""
    side_by_side = x.stride(1) == 1 or x.shape[1] == 1
    return x if side_by_side and x.stride(0) <= LARGEST_ROW_STRIDE else x.contiguous()


@mix.register_fake
def _(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, shape: Sequence[int], keep: bool) -> list[Tensor]:
    y = x.new_empty(x.shape[0], shape[1])
    return [y, *(x.new_empty(x.shape[0], block.shape[0] * block.shape[1]) for block in blocks[:-1])] if keep else [y]


@mix_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    blocks: Sequence[Tensor],
    hidden: Sequence[Tensor],
    shape: Sequence[int],
    needs_x: bool,
    needs_blocks: bool,
) -> list[Tensor]:
    found = [grad.new_empty(x.shape[0], shape[0])] if needs_x else []
    return [*found, *(torch.empty_like(block) for block in blocks)] if needs_blocks else found


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, blocks, _, ctx.shape, ctx.keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *blocks, *output[1:])
    ctx.passes = len(blocks)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    grad, *between = grads
    x, *saved = ctx.saved_tensors
    blocks, hidden = saved[: ctx.passes], saved[ctx.passes :]
    if any(found is not None for found in between):
        raise BackendError("backend triton has no gradient for the activations between passes; use merged or reference")
    if grad is None:
        return None, [None] * ctx.passes, None, None, None
    needs_x, needs_blocks = ctx.needs_input_grad[0], ctx.keep
    if torch.is_grad_enabled():
        found = _differentiable_backward(grad, x, blocks, ctx.shape, needs_x, needs_blocks)
    else:
        found = mix_backward(grad, x, blocks, hidden, ctx.shape, needs_x, needs_blocks)
    grad_x = found[0] if needs_x else None
    grad_blocks = list(found[-ctx.passes :]) if needs_blocks else [None] * ctx.passes
    return grad_x, grad_blocks, grad.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _differentiable_backward(
    grad: Tensor, x: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], needs_x: bool, needs_blocks: bool
) -> Sequence[Tensor]:
    """What ``mix_backward`` computes, from PyTorch operations that can be differentiated again."""
    passes = _passes(blocks, shape)
    h = expand(x, passes[0].batches * passes[0].columns)
    for p, w in zip(passes, blocks, strict=True):
        outer = p.batches // p.inner
        h = h.reshape(-1, outer, p.columns // p.block, p.inner, p.block)
        h = torch.einsum("tomic,oirdmc->torid", h, w.reshape(outer, p.inner, -1, p.block, p.columns // p.block, p.block))
    y = fold(h.reshape(x.shape[0], -1), shape[1])
    return torch.autograd.grad(y, [x] * needs_x + [*blocks] * needs_blocks, grad, create_graph=True)


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise BackendError("backend triton cannot run under torch.vmap; put the batch into the tokens, or use merged or reference")


mix.register_autograd(_backward, setup_context=_save)
mix.register_vmap(_refuse_vmap)
mix_backward.register_vmap(_refuse_vmap)
