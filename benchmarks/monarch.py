"""A projection of a dense layer onto Monarch matrices, which the converter does not build.

The factors are multiplied out on every call where what lies between them is wider than the layer: on a CPU a forward pass
over 2048 tokens of 256 -> 1024 then takes as long as the dense layer's, the two factors one after the other 9 times as
long at a quarter of the parameters and 50 times at half of them. Below that width the two factors are used, and are faster.
"""

import itertools
from collections.abc import Sequence

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

        Of the largest shapes within the budget the one with the least error is taken; no data is used except for the
        bias, as in the projection of the paper.
        """
        cuts = (slices(layer.weight, *shape) for shape in largest_shapes(layer.weight, keep))
        left, size, right = max((torch.linalg.svd(cut, full_matrices=False) for cut in cuts), key=caught)
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


def largest_shapes(weight: torch.Tensor, keep: float) -> list[tuple[int, int]]:
    """Blocks and groups, powers of two, of the factors within a share of the parameters that cannot have twice as many."""
    out_features, in_features = weight.shape
    shapes = itertools.product(powers_of_two(in_features), powers_of_two(out_features))
    fitting = {
        (blocks, groups)
        for blocks, groups in shapes
        if groups * in_features + blocks * out_features <= keep * weight.numel()
    }
    return sorted(shape for shape in fitting if not fitting & {(2 * shape[0], shape[1]), (shape[0], 2 * shape[1])})


def slices(weight: torch.Tensor, blocks: int, groups: int) -> torch.Tensor:
    """What is of rank one in a product of two factors: [groups, blocks, out_features / groups, in_features / blocks]."""
    out_features, in_features = weight.shape
    return weight.view(out_features // groups, groups, blocks, in_features // blocks).permute(1, 2, 0, 3)


def caught(decomposed: Sequence[torch.Tensor]) -> float:
    """The squared norm that the first directions of all slices hold, of their singular value decomposition."""
    return float(decomposed[1][..., 0].square().sum())


def powers_of_two(size: int) -> list[int]:
    """Powers of two that divide a size."""
    return [2**power for power in range(size.bit_length()) if size % 2**power == 0]
