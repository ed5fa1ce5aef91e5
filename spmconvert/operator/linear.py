"""SPMLinear: the layer that takes the place of nn.Linear.

It owns the parameters and their initialisation and chooses who computes; the arithmetic is in ``reference``, ``merged`` and
``triton``. The stages are one parameter called ``weight`` with three or more dimensions: model code that initialises
``module.weight`` keeps working, and a program that does not know this layer fails on the shape instead of loading
something random. There are no buffers: pairings follow from integers, so nothing can come back uninitialised.

Calls that train no stage keep the merged blocks for the next one until a parameter changes; ``kept`` says how a change is
seen. ``train()``, ``eval()``, conversions (``.to``) and ``load_state_dict`` drop them at once, copies and pickles leave
them behind.

What it gives up: writes through ``parameter.data`` are not seen, so call ``train()`` or ``eval()`` after such a write.
Graphs made by ``torch.compile`` merge at every call.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spmconvert.operator.dispatch import Backend, resolve_backend
from spmconvert.operator.geometry import Geometry, Variant
from spmconvert.operator.kept import KeptBlocks, Merge, can_be_kept
from spmconvert.operator.merged import apply_blocks, merge_plan, merge_stages
from spmconvert.operator.reference import is_transformed, reference_forward
from spmconvert.operator.triton.merge import merge_stages_triton
from spmconvert.operator.triton.mix import apply_blocks_triton


class SPMLinear(nn.Module):
    """A linear layer whose matrix is fold · D_out · B_L ··· B_1 · D_in · expand, plus a low-rank companion.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether the layer has a bias.
        stages: number of stages; None for one pass over all strides.
        variant: ``general`` or ``rotation``.
        block: coordinates per block.
        rank: rank of the companion, 0 for none.
        width: number of mixed coordinates; None chooses it. A checkpoint names it.
        backend: ``auto``, ``reference``, ``merged`` or ``triton``.
        device: device of the parameters.
        dtype: dtype of the parameters. It may be wider than that of the inputs, in which the output comes back: blocks
            are merged in float32 or wider and rounded once. The reference rounds the parameters instead.

    Shape:
        input [..., in_features] -> output [..., out_features]

    Attributes:
        weight: stages, [stages, 2, blocks, block, block] (general) or [stages, 1, width // 2] (rotation, in radians).
        scale_in: D_in, [width].
        scale_out: D_out, [width].
        low_rank_in: V of the companion, [rank, in_features], or None.
        low_rank_out: U of the companion, [out_features, rank], or None.
        bias: [out_features], or None.

    Raises:
        OptionError: when the numbers do not describe a layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        stages: int | None = None,
        variant: Variant = "general",
        block: int = 1,
        rank: int = 0,
        width: int | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = Geometry.create(in_features, out_features, stages, variant, block, rank)
        if width is not None:
            geometry = Geometry(in_features, out_features, width, geometry.stages, variant, block, rank)
        self.geometry = geometry
        self.plan = merge_plan(geometry)
        self.in_features, self.out_features = in_features, out_features
        self.backend: Backend = backend
        resolve_backend("auto" if backend == "triton" else backend, "cpu")

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = empty(*geometry.weight_shape())
        self.scale_in = empty(geometry.width)
        self.scale_out = empty(geometry.width)
        self.low_rank_in = empty(rank, in_features) if rank else None
        self.low_rank_out = empty(out_features, rank) if rank else None
        self.bias = empty(out_features) if bias else None
        self._cache: KeptBlocks | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from rows of random rotations, which keep the inputs' variance; companion and bias start without effect."""
        geometry = self.geometry
        with torch.no_grad():
            angles = torch.empty_like(self.weight[:, 0]).uniform_(-torch.pi, torch.pi)
            if geometry.variant == "rotation":
                self.weight[:, 0] = angles
            else:
                # rows of a random orthogonal 2 x 2 matrix, spread over dense mixers where block > 1
                self.weight[:, 0] = angles.cos() * geometry.block**-0.5
                self.weight[:, 1] = angles.sin() * geometry.block**-0.5
            self.scale_in.fill_(1.0)
            self.scale_out.fill_((geometry.out_features / geometry.width) ** 0.5)
            if self.low_rank_in is not None and self.low_rank_out is not None:
                self.low_rank_in.normal_(std=geometry.in_features**-0.5)
                self.low_rank_out.zero_()
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in_features] -> [..., out_features], in the dtype of x or of autocast."""
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            with torch.autocast(device, enabled=False):
                return self._run(x.to(torch.get_autocast_dtype(device)))
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        # read once: a parametrization computes them at every access
        parameters = (self.weight, self.scale_in, self.scale_out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        compiles = torch.compiler.is_compiling()
        step_tokens = tokens.shape[0] if trains and not compiles else None
        backend = resolve_backend(self.backend, x.device.type, tokens=step_tokens)
        # an empty chain has nothing to merge: the operator is a diagonal
        if backend == "reference" or self.geometry.stages == 0:
            y = reference_forward(tokens, *parameters, self.geometry)
            y = y if bias is None else y + bias
        else:
            by_triton = backend == "triton"
            merge = merge_stages_triton if by_triton else merge_stages
            keeps = not trains and not compiles and can_be_kept(self, parameters)
            blocks = (self._kept_blocks if keeps else self._new_blocks)(x.dtype, merge, parameters)
            y = (apply_blocks_triton if by_triton else apply_blocks)(tokens, blocks, bias, self.plan)
        if self.low_rank_in is not None and self.low_rank_out is not None:
            # in place: nothing else reads y, and a sum beside it would be one more pass over the outputs
            add_product = torch.addmm if is_transformed() else Tensor.addmm_
            y = add_product(y, linear(tokens, self.low_rank_in.to(x.dtype)), self.low_rank_out.to(x.dtype).t())
        return y.view(*x.shape[:-1], self.out_features)

    def _new_blocks(self, dtype: torch.dtype, merge: Merge, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        return [block.to(dtype) for block in merge(*parameters, self.plan)]

    def _kept_blocks(self, dtype: torch.dtype, merge: Merge, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        kept = self._cache
        if kept is None or not kept.serve(dtype, merge, parameters):
            # blocks made inside inference mode could not be used outside of it
            with torch.inference_mode(False), torch.no_grad():
                kept = KeptBlocks.of(self._new_blocks(dtype, merge, parameters), dtype, merge, parameters)
            self._cache = kept
        return kept.blocks

    def to_dense(self) -> Tensor:
        """The matrix the layer multiplies by, [out_features, in_features], differentiable, companion included."""
        identity = torch.eye(self.in_features, dtype=self.weight.dtype, device=self.weight.device)
        dense = reference_forward(identity, self.weight, self.scale_in, self.scale_out, self.geometry).t()
        if self.low_rank_in is not None and self.low_rank_out is not None:
            dense = dense + self.low_rank_out @ self.low_rank_in
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Drop the cached blocks with every conversion: tensors with weak references cannot be swapped for others."""
        self._cache = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Drop the cached blocks: tensors with weak references cannot be swapped, which is one way to load."""
        self._cache = None
        super()._load_from_state_dict(*arguments, **options)

    def train(self, mode: bool = True) -> Self:
        """Set the mode and drop the cached blocks."""
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of pickles and copies."""
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        """Shape, design, and the share of the dense parameters that is left."""
        g = self.geometry
        kept = g.parameter_count(bias=False) / (g.in_features * g.out_features)
        parts = [f"in_features={g.in_features}, out_features={g.out_features}, bias={self.bias is not None}"]
        parts.append(f"width={g.width}, stages={g.stages}, variant={g.variant}")
        parts += [f"block={g.block}"] if g.block != 1 else []
        parts += [f"rank={g.rank}"] if g.rank else []
        parts.append(f"kept={kept:.1%}")
        return ", ".join(parts)
