"""A layer that nothing trains any more, as a server runs it: what calls would make of parameters is made once.

``SPMLinear`` keeps merged blocks and whole matrices from call to call and has to see when a parameter changes; in a graph
of ``torch.compile`` it cannot, and merges at every call. Here they take the place of the parameters instead, in the
dtype of the calls, so that a compiler and a captured CUDA graph meet products and nothing else.

Products with one matrix are ``DenseProduct``, so that a runtime can put its own in their place. Terms that run dense (2:4)
take all others of their layer into one matrix of full size, as on a CPU. What it gives up: the parameters, which are
gone, and the chunks that stay in a CPU's cache.
"""

import torch
from torch import Tensor, nn

from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.product import DenseProduct


class FrozenLinear(nn.Module):
    """What an ``SPMLinear`` computes, without its bias.

    Args:
        layer: with its final parameters; its terms may be taken over, so it is not used after this.
        dtype: of the inputs to come.

    Shape:
        input [tokens, in_features] -> output [tokens, out_features]

    Attributes:
        terms: in the order of the design.
    """

    @torch.no_grad()
    def __init__(self, layer: SPMLinear, dtype: torch.dtype) -> None:
        super().__init__()
        if layer.design.runs_dense:
            self.terms = nn.ModuleList([DenseProduct(layer.to_dense().to(dtype))])
        else:
            self.terms = nn.ModuleList(term.frozen(dtype) for term in layer.term_modules)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """All terms of x, and a bias [out_features]."""
        first, *others = self.terms
        y: Tensor = first.biased(x, bias)  # type: ignore[operator]
        for term in others:
            y = y + term(x)
        return y
