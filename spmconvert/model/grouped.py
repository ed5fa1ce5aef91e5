"""Products of many experts at once: rows sorted by expert, each times the matrix of its own expert.

torch has one operation for it (``grouped_mm``), and transformers decides for its own experts where that can be taken; here
its decision is asked for. Where it cannot, transformers' own operation in its place is one product an expert, which
``torch.compile`` and autograd see as one. torch refuses matrices whose rows do not begin at multiples of 16 bytes, on a GPU
only when it runs, so these go the same way: a rank that is no multiple of eight, in half precision.
"""

import torch
from torch import Tensor

# of the beginning of rows
_ALIGNED_BYTES = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ends_of(experts: Tensor, count: int) -> Tensor:
    """Where the rows of each of so many experts end: experts [rows], sorted -> [count], int32; waits for no device."""
    return torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True, out_int32=True)


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows times matrices, differentiable.

    Args:
        rows: [rows, in_features], sorted by expert.
        weight: [experts, out_features, in_features], in the dtype of the rows.
        ends: of the rows of each expert, [experts], int32.

    Returns:
        [rows, out_features].
    """
    from transformers.integrations.moe import _grouped_mm

    matrices = weight.transpose(1, 2)
    aligned = all(size * weight.itemsize % _ALIGNED_BYTES == 0 for size in weight.shape[1:])
    if aligned and weight.dtype in _DTYPES:
        product: Tensor = _grouped_mm(rows, matrices, ends)
    else:
        product = torch.ops.transformers.grouped_mm_fallback(rows, matrices, ends)
    return product
