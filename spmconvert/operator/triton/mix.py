"""The Triton backend as ``torch.library`` operators, with output shapes and gradients; ``launches`` runs the kernels.

``torch.compile`` and ``torch.export`` see opaque operators with known output shapes, so they neither break nor trace the
launches. ``mix`` runs all passes of a layer over its tokens; ``mix_backward`` runs the transposed passes for the
gradient of the input, and sums output gradient times input over the tokens for the gradient of the blocks. From the
blocks to the stages the gradient goes through the merge, see ``merge``.

What it gives up: float64 and integers are refused, and so are transforms (``refusals``); a second derivative is computed
by plain PyTorch operations. A dense plan has no passes, and its one matrix product is left to
``torch.nn.functional.linear``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spmconvert.errors import BackendError
from spmconvert.operator.merged import MergePlan
from spmconvert.operator.reference import expand, fold
from spmconvert.operator.triton.launches import block_gradient, run_passes
from spmconvert.operator.triton.refusals import refuse_batched_gradients, refuse_transforms
from spmconvert.operator.triton.tiles import Pass

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def apply_blocks_triton(x: Tensor, blocks: Sequence[Tensor], bias: Tensor | None, plan: MergePlan) -> Tensor:
    """Run merged blocks; the arguments and the result of ``merged.apply_blocks``.

    Raises:
        BackendError: when the dtype is not float32, float16 or bfloat16, or under a transform.
    """
    refuse_transforms()
    if x.dtype not in DTYPES:
        found = str(x.dtype).removeprefix("torch.")
        raise BackendError(
            f"backend triton computes in float32, float16 and bfloat16, the input is {found}; "
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
    y, hidden = run_passes(x, list(blocks), bias, passes, shape[1], keep=keep, transposed=False)
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
        found, between = run_passes(
            grad, blocks[::-1][:used], None, back[:used], target, keep=needs_blocks, transposed=True
        )
        grads += [*between, found]
    results = [grads[-1]] if needs_x else []
    if needs_blocks:
        inputs = [x, *hidden]
        for index, (p, block) in enumerate(zip(passes, blocks, strict=True)):
            results.append(block_gradient(grads[len(passes) - 1 - index], inputs[index], p, block.dtype))
    return results


def _passes(blocks: Sequence[Tensor], shape: Sequence[int]) -> list[Pass]:
    sizes = ((*block.shape, inner) for block, inner in zip(blocks, shape[3:], strict=True))
    return [Pass(batches, columns, rows, inner, shape[2]) for batches, rows, columns, inner in sizes]


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


mix.register_autograd(_backward, setup_context=_save)
mix_backward.register_vmap(refuse_batched_gradients)
