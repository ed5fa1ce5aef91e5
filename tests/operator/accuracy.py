"""How exact the Triton kernels have to be: within twice the error of the merged form in plain PyTorch of the same dtype."""

import torch

from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.merged import apply_blocks, merge_plan, merge_stages
from spmconvert.operator.triton.mix import apply_blocks_triton
from tests.operator.test_merged import by_reference, relative, tensors


def run(apply, inputs, geometry, wanted=range(5)):
    """Output, and gradients of the wanted inputs."""
    leaves = [p.detach().requires_grad_(index in wanted) for index, p in enumerate(inputs)]
    x, *parameters, bias = leaves
    if apply is by_reference:
        y = by_reference(*leaves, geometry)
    else:
        plan = merge_plan(geometry)
        y = apply(x, [block.to(x.dtype) for block in merge_stages(*parameters, plan)], bias, plan)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in wanted], grad.to(y.device, y.dtype))]


def assert_within_twice(geometry, tokens, dtype, view=lambda x: x, wanted=range(5), device="cpu"):
    """Errors of output and gradients are within twice those of the merged form in plain PyTorch."""
    low = [p.detach().to(device, dtype) for p in tensors(geometry, tokens)]
    low[0] = view(low[0])
    target = run(by_reference, [p.double() for p in low], geometry, wanted)
    plain, found = run(apply_blocks, low, geometry, wanted), run(apply_blocks_triton, low, geometry, wanted)
    # the interpreter truncates to bfloat16 instead of rounding, which is one unit in the last place
    slack = 2.0**-8 if dtype == torch.bfloat16 and interprets_triton() else 1e-7
    for one, own, exact in zip(found, plain, target, strict=True):
        assert one.dtype == dtype
        assert relative(one.double(), exact) <= 2 * relative(own.double(), exact) + slack
