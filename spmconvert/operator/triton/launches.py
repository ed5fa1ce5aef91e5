"""Which Triton kernels run for a layer: tokens through its passes, and the gradient of its blocks.

Up to ``tiles.FEW_TOKENS`` tokens every forward pass is one launch of a kernel without padding; two passes may run in one
launch (``tiles.fuses``); otherwise a pass is a launch. All sizes follow from shapes and from tiles that ``tuning`` never
times during a capture, so a launch sequence can be captured in a CUDA graph: no host synchronisation, no data-dependent
allocation.
What remains of ``expand`` and ``fold`` is done by loads modulo the features and by a second output, the tail, that is
folded and added at the end.

The gradient of the blocks is summed over tokens in two steps: programs that share the tokens each write a part of their
own, and the parts are added afterwards, so that results are the same in every run, which atomic additions are not.

What it gives up: the columns of a row have to lie side by side; other inputs are copied first.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.reference import fold
from spmconvert.operator.triton import tiles
from spmconvert.operator.triton.tiles import Pass, Tile, Tiles
from spmconvert.operator.triton.tuning import choose

# offsets inside a tile are 32-bit; rows further apart than this are copied together first
LARGEST_ROW_STRIDE = 1 << 24
# multiprocessors that the interpreter, which has none, shares tokens out to: few enough to run loops, enough to split
INTERPRETED_MULTIPROCESSORS = 2


@cache
def _kernels() -> ModuleType:
    # importing Triton is slow, and the package works without it
    from spmconvert.operator.triton import kernels

    return kernels


def run_passes(
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
    between: list[Tensor] = []
    index = 0
    while index < len(passes) and x.shape[0]:
        pair = tiles.fuses(passes[index : index + 2], x.shape[0], x.element_size())
        last = index + 1 + pair == len(passes)
        width = widths[index + pair]
        out, rest = (y, tail) if last else (x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], 0))
        job = _Job(x, out, rest, bias if last else None, transposed)
        if pair:
            between += _launch_fused(job, blocks[index : index + 2], passes[index : index + 2], keep=keep)
        elif not transposed and tiles.has_few_tokens(x.shape[0], passes):
            _launch_few(job, blocks[index], passes[index])
        else:
            _launch_mix(job, blocks[index], passes[index])
        between += [] if last or not keep else [out]
        x = out
        index += 1 + pair
    if not x.shape[0] and keep:
        between = [x.new_empty(0, width) for width in widths[:-1]]
    if tail.shape[1]:
        # one sum, which PyTorch rounds once, however often the outputs fold
        folded = fold(tail, target) if tail.shape[1] > target else tail
        y[:, : folded.shape[1]] += folded
    return y, between


def block_gradient(grad: Tensor, x: Tensor, p: Pass, dtype: torch.dtype) -> Tensor:
    """Output gradient times input, summed over tokens: [batches, rows, columns]."""
    grad, x = _rows(grad), _rows(x)
    if not x.shape[0]:
        return x.new_zeros(p.batches, p.rows, p.columns, dtype=dtype)
    arguments = {"grad": grad, "x": x, "tokens": x.shape[0], "grad_stride": grad.stride(0), "x_stride": x.stride(0)}
    constants: dict[str, Any] = {"PASS": tuple(p), "SOURCE": x.shape[1], "TARGET": grad.shape[1], **_arithmetic(x)}

    def run(chosen: Tiles) -> Tensor:
        (tile,) = chosen
        items = _items(p, tile) * tiles.count(p.columns, tile.columns)
        shares = tiles.token_shares(tile, items, x.shape[0], _multiprocessors(x))
        parts = x.new_empty(shares, p.batches, p.rows, p.columns, dtype=torch.float32)
        constants_of_tile = {**constants, "TILE": tile.sizes}
        launch("block_gradient_kernel", (items, shares), {**arguments, "parts": parts}, constants_of_tile, tile)
        return (parts[0] if shares == 1 else parts.sum(0)).to(dtype)

    return run(choose("gradient", (p,), x, constants, run))


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
    constants: dict[str, Any] = {"PASS": tuple(p), **job.features()}

    def run(chosen: Tiles) -> None:
        (tile,) = chosen
        grid = (_items(p, tile), job.x.shape[0])
        launch("few_tokens_kernel", grid, {**job.arguments(), "w": w}, {**constants, "TILE": tile.sizes}, tile)

    run(choose("few", (p,), job.x, constants, run))


def _launch_mix(job: _Job, w: Tensor, p: Pass) -> None:
    x = job.x
    arguments = {**job.arguments(), "w": w, "tokens": x.shape[0]}
    constants: dict[str, Any] = {"PASS": tuple(p), "TRANSPOSED": job.transposed, **job.features(), **_arithmetic(x)}

    def run(chosen: Tiles) -> None:
        (tile,) = chosen
        items = _items(p, tile)
        grid = (items, tiles.token_shares(tile, items, x.shape[0], _multiprocessors(x)))
        launch("mix_kernel", grid, arguments, {**constants, "TILE": tile.sizes}, tile)

    run(choose("mix", (p,), x, constants, run))


def _launch_fused(job: _Job, blocks: Sequence[Tensor], pair: Sequence[Pass], *, keep: bool) -> list[Tensor]:
    """Two passes in one launch; returns the activations between them if they are kept."""
    x, (first, second) = job.x, pair
    width = first.batches * first.rows
    arguments = {**job.arguments(), "w": blocks[0], "next_w": blocks[1], "tokens": x.shape[0]}
    constants: dict[str, Any] = {"PASS": tuple(first), "NEXT_PASS": tuple(second), "HIDDEN": width, "KEEP": keep}
    constants |= {**job.features(), "TRANSPOSED": job.transposed, **_arithmetic(x)}

    def run(chosen: Tiles) -> Tensor:
        tile, next_tile = chosen
        programs = min(tiles.count(x.shape[0], tile.tokens), tiles.programs(tile, _multiprocessors(x)))
        hidden = x.new_empty(x.shape[0] if keep else programs * tile.tokens, width)
        sizes = {"TILE": tile.sizes, "NEXT_TILE": next_tile.sizes}
        launch("fused_kernel", (programs,), {**arguments, "hidden": hidden}, {**constants, **sizes}, tile)
        return hidden

    hidden = run(choose("fused", (first, second), x, constants, run))
    return [hidden] if keep else []


def launch(kernel: str, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], tile: Tile) -> None:
    """Launch a kernel of ``kernels`` on the device of its tensors."""
    function = getattr(_kernels(), kernel)
    # multiply-adds are fused as they always were; saying so keeps Triton from warning that its default will change
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        function[grid](**arguments, **constants, **options)


def _items(p: Pass, tile: Tile) -> int:
    """Number of tiles of batches and rows."""
    return tiles.count(p.batches, tile.batches) * tiles.count(p.rows, tile.rows)


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
