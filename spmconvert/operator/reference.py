"""The SPM operator stage by stage, with the closed-form backward of both variants.

This is the definition every other implementation is tested against, and it is what turns stages into merged blocks
(``merged.merge_stages`` runs the stages over probe vectors); only the Triton kernels that merge write a stage down again.
Forward and backward follow arXiv 2512.23905, sections 3 and 4, with three extensions: widths that are not powers of two,
dense 2 block x 2 block mixers, and inputs and outputs of different sizes.

What it gives up is speed: every stage moves the activations through memory once. It beats a dense layer only where that
is wide and the tokens are few, and has 0.36 of its speed at width 1024 and 1024 tokens on a CPU; see
benchmarks/results/operator-cpu-2026-11-29.json.

Stages see activations coordinates first, [blocks, block, tokens].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spmconvert.operator.geometry import Geometry, stage_exponent


def partner_index(stage: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partner of every block in a stage, as tensors.

    Returns:
        index [blocks] (int64; an unpaired block is its own partner) and paired [blocks] (bool).
    """
    own = torch.arange(blocks, device=device)
    partner = own ^ (1 << stage_exponent(stage, blocks))
    paired = partner < blocks
    return torch.where(paired, partner, own), paired


def rotation_index(stage: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower and upper coordinate of every pair of a rotation stage, each [pairs in this stage] (int64)."""
    stride = 1 << stage_exponent(stage, width)
    whole, rest = divmod(width, 2 * stride)
    pair = torch.arange(whole * stride + max(0, rest - stride), device=device)
    lower = torch.div(pair, stride, rounding_mode="floor") * (2 * stride) + pair % stride
    return lower, lower + stride


def _mix(mixer: Tensor, x: Tensor) -> Tensor:
    # bmm of 1 x 1 matrices is many times slower than the product it stands for
    return mixer * x if mixer.shape[-1] == 1 else torch.bmm(mixer, x)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[1] == 1:
        return (left * right).sum(-1, keepdim=True)
    return torch.bmm(left, right.transpose(1, 2))


def _general_stage(x: Tensor, mixers: Tensor, index: Tensor, paired: Tensor) -> Tensor:
    """y_i = A_i x_i + B_i x_partner(i); unpaired blocks have no B term (paper, section 3.2).

    x [blocks, block, tokens], mixers [2, blocks, block, block] -> like x.
    """
    own, other = mixers[0], mixers[1] * paired[:, None, None]
    return _mix(own, x) + _mix(other, x[index])


def _rotation_stage(x: Tensor, angles: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(y_l, y_u) = (cos x_l - sin x_u, sin x_l + cos x_u) for every pair; unpaired coordinates pass (section 3.1).

    x [width, tokens], angles [pairs] -> like x.
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    y = x.index_copy(0, lower, cos * x[lower] - sin * x[upper])
    return y.index_copy(0, upper, sin * x[lower] + cos * x[upper])


class _GeneralStage(torch.autograd.Function):
    """``_general_stage`` with the backward in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixers: Tensor, index: Tensor, paired: Tensor) -> Tensor:
        """Mix pairs of blocks."""
        ctx.save_for_backward(x, mixers, index, paired)
        return _general_stage(x, mixers, index, paired)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Closed form (paper, section 4): the transposed mixers on the gradient, outer products for the mixers."""
        (grad,) = grads
        x, mixers, index, paired = ctx.saved_tensors
        mask = paired[:, None, None]
        own, other = mixers[0].transpose(1, 2), (mixers[1] * mask).transpose(1, 2)
        grad_x = _mix(own, grad) + _mix(other, grad)[index] * mask
        grad_mixers = torch.stack([_outer(grad, x), _outer(grad, x[index]) * mask])
        return grad_x, grad_mixers, None, None


class _RotationStage(torch.autograd.Function):
    """``_rotation_stage`` with the backward in closed form, from the output instead of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Rotate pairs."""
        y = _rotation_stage(x, angles, lower, upper)
        ctx.save_for_backward(y, angles, lower, upper)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient back; d angle = sum over tokens of g_u y_l - g_l y_u (section 4.1)."""
        (grad,) = grads
        y, angles, lower, upper = ctx.saved_tensors
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        grad_lower, grad_upper = grad[lower], grad[upper]
        grad_x = grad.index_copy(0, lower, cos * grad_lower + sin * grad_upper)
        grad_x = grad_x.index_copy(0, upper, cos * grad_upper - sin * grad_lower)
        grad_angles = (grad_upper * y[lower] - grad_lower * y[upper]).sum(-1)
        return grad_x, grad_angles, None, None


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad and their kin) or forward-mode differentiation follows what is computed now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether torch.compile, an export or a tracer writes down what is computed: nothing may be kept from call to call."""
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state())


def apply_stages(x: Tensor, weight: Tensor, geometry: Geometry, first: int, count: int) -> Tensor:
    """Run consecutive stages.

    Args:
        x: [blocks, block, tokens].
        weight: all stages, of shape ``geometry.weight_shape()``, dtype of x.
        geometry: shape of the layer.
        first: index of the first stage to run.
        count: number of stages to run.

    Returns:
        [blocks, block, tokens].
    """
    return run_stages(x, weight, geometry, range(first, first + count), *_closed_forms())


def _closed_forms() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """How a general and a rotation stage are computed: in closed form, unless a transform has to follow them."""
    # for transforms a closed form needs bookkeeping that costs every ordinary call 35 microseconds a stage
    return (_general_stage, _rotation_stage) if is_transformed() else (_GeneralStage.apply, _RotationStage.apply)


def run_stages(
    x: Tensor, weight: Tensor, geometry: Geometry, stages: range, mix: Callable[..., Tensor], rotate: Callable[..., Tensor]
) -> Tensor:
    """Run stages by two given functions, for general and for rotation ones; x [blocks, block, tokens] -> like x."""
    for stage in stages:
        if geometry.variant == "rotation":
            lower, upper = rotation_index(stage, geometry.width, x.device)
            angles = weight[stage, 0, : lower.shape[0]]
            x = rotate(x.squeeze(1), angles, lower, upper).unsqueeze(1)
        else:
            index, paired = partner_index(stage, geometry.blocks, x.device)
            x = mix(x, weight[stage], index, paired)
    return x


def expand(x: Tensor, width: int) -> Tensor:
    """Tile the features of x [tokens, in_features] to [tokens, width]: coordinate i takes feature i mod in_features."""
    tiles = -(-width // x.shape[1])
    return x if width == x.shape[1] else x.repeat(1, tiles)[:, :width]


def fold(y: Tensor, out_features: int) -> Tensor:
    """Sum the coordinates of y [tokens, width] to [tokens, out_features]: output j takes all i with i mod out = j."""
    tokens, width = y.shape
    if width == out_features:
        return y
    padded = torch.nn.functional.pad(y, (0, -width % out_features))
    return padded.view(tokens, padded.shape[1] // out_features, out_features).sum(1)


def reference_forward(x: Tensor, weight: Tensor, scale_in: Tensor, scale_out: Tensor, geometry: Geometry) -> Tensor:
    """Run the operator without bias.

    Args:
        x: [tokens, in_features].
        weight: stages, ``geometry.weight_shape()``.
        scale_in: diagonal before the stages, [width].
        scale_out: diagonal after the stages, [width].
        geometry: shape of the layer.

    Returns:
        [tokens, out_features] in the dtype of x, in which all arithmetic is done.
    """
    return plain_forward(x, weight, scale_in, scale_out, geometry, *_closed_forms())


def plain_forward(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    geometry: Geometry,
    mix: Callable[..., Tensor] = _general_stage,
    rotate: Callable[..., Tensor] = _rotation_stage,
) -> Tensor:
    """``reference_forward`` by two given functions for general and for rotation stages."""
    weight, scale_in, scale_out = (p.to(x.dtype) for p in (weight, scale_in, scale_out))
    coordinates = (expand(x, geometry.width) * scale_in).t().reshape(geometry.blocks, geometry.block, x.shape[0])
    mixed = run_stages(coordinates, weight, geometry, range(geometry.stages), mix, rotate)
    return fold(mixed.reshape(geometry.width, x.shape[0]).t() * scale_out, geometry.out_features)
