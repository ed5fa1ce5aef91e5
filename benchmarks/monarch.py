"""A projection of a dense layer onto Monarch matrices, which the converter does not build.

The factors are multiplied out on every call where what lies between them is wider than the layer: on a CPU a forward pass
over 2048 tokens of 256 -> 1024 then takes as long as the dense layer's, the two factors one after the other 9 times as
long at a quarter of the parameters and 50 times at half of them. Below that width the two factors are used, and are faster.
"""

import torch

from benchmarks.common import Layer


class MonarchLinear(torch.nn.Module):
    """Two block-diagonal factors with a permutation between them (Dao et al. 2022), as many blocks in each.

    Args:
        inner: [blocks, middle, in_features / blocks].
        outer: [middle', out_features / middle', blocks] with as many rows as the inner factor has outputs a block.
        bias: [out_features].
    """

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Parameter(inner), torch.nn.Parameter(outer)
        self.bias = torch.nn.Parameter(bias)

    @classmethod
    def of(cls, layer: Layer, keep: float) -> "MonarchLinear":
        """Project a weight: every slice of it that two factors share is a matrix of rank one, found by its SVD.

        The number of blocks is the power of two with the most parameters within the budget; no data is used except for
        the bias, as in the projection of the paper.
        """
        out_features, in_features = layer.weight.shape
        allowed = [
            (blocks, groups)
            for blocks in powers_of_two(in_features)
            for groups in powers_of_two(out_features)
            if groups * in_features + blocks * out_features <= keep * layer.weight.numel()
        ]
        blocks, groups = max(allowed, key=lambda pair: pair[0] * pair[1])
        slices = layer.weight.view(out_features // groups, groups, blocks, in_features // blocks).permute(1, 2, 0, 3)
        left, size, right = torch.linalg.svd(slices, full_matrices=False)
        root = size[..., :1].sqrt()
        outer = (left[..., 0] * root).transpose(1, 2)
        inner = (right[..., 0, :] * root).transpose(0, 1)
        module = cls(inner.contiguous(), outer.contiguous(), layer.bias.clone())
        with torch.no_grad():
            module.bias.add_((layer.weight - module.matrix()) @ layer.fitted.mean)
        return module

    def matrix(self) -> torch.Tensor:
        """The factors multiplied out, [out_features, in_features]."""
        groups, rows, blocks = self.outer.shape
        return torch.einsum("gob,bgi->ogbi", self.outer, self.inner).reshape(rows * groups, blocks * self.inner.shape[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        blocks, groups, width = self.inner.shape
        if blocks * groups > max(self.outer.shape[0] * self.outer.shape[1], blocks * width):
            return torch.nn.functional.linear(x, self.matrix(), self.bias)
        rows = x.reshape(-1, blocks, width).transpose(0, 1)
        # one transposition a factor: without it every matrix of the batched products is copied, which costs more
        hidden = torch.bmm(rows, self.inner.mT).permute(2, 1, 0).contiguous()
        mixed = torch.bmm(hidden, self.outer.mT).permute(1, 2, 0).contiguous()
        return mixed.view(*x.shape[:-1], -1) + self.bias


def powers_of_two(size: int) -> list[int]:
    """Powers of two that divide a size."""
    return [2**power for power in range(size.bit_length()) if size % 2**power == 0]
