"""One dense product whose weight is final, and whose product another runtime may choose."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

Multiply = Callable[[Any, Tensor, Tensor | None], Tensor]


def multiply(product: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """As torch does it."""
    return linear(x, product.weight, bias)


class DenseProduct(nn.Module):
    """A matrix by itself.

    Attributes:
        weight: [out_features, in_features].
        multiply: called with this module, an input and a bias. A runtime that has its own products sets it, and may
            lay the weight out anew for them.
    """

    multiply: Multiply

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix, requires_grad=False)
        self.multiply = multiply

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with x [tokens, in_features] -> [tokens, out_features], plus a bias [out_features]."""
        return self.multiply(self, x, bias)

    biased = forward
