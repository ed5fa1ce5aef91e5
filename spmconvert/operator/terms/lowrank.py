"""Low rank: two ordinary ``nn.Linear``, ``down`` without a bias and ``up`` with the layer's, and nothing else.

Alone in a layer it is exactly those two products, so that adapters, quantisers and exporters see what they know. Beside
other terms it is added in place, since its product can end in the output that they wrote.

Fitted in closed form: whitened truncated SVD, the best matrix of its rank in the norm of the inputs and the metric of the
outputs (``operator/factors``). Both factors of every rank get the same norm, so that steps of one size suit them when they
are trained further: a weighted fit leaves them orders of magnitude apart, and a finetune at 3e-3 then never goes below its
start.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spmconvert.errors import OptionError
from spmconvert.operator.dispatch import Backend
from spmconvert.operator.factors import truncated_svd
from spmconvert.operator.int8 import is_int8, numbers
from spmconvert.operator.product import DenseProduct
from spmconvert.operator.reference import is_transformed
from spmconvert.operator.terms.module import LeastSquares, TermModule
from spmconvert.operator.terms.term import Term

# ranks that are multiples of it run faster on most machines
ALIGNED = 8


@dataclass(frozen=True)
class LowRank(Term):
    """U V with an inner size of ``rank``."""

    kind: ClassVar[str] = "lowrank"

    rank: int = 1

    def __post_init__(self) -> None:
        """Refuse a rank that no layer can have."""
        self.require("rank", 1)
        smallest = min(self.in_features, self.out_features)
        if self.rank > smallest:
            raise OptionError(f"rank is {self.rank}; it can be at most min(in_features, out_features) = {smallest}")

    def parameter_count(self) -> int:
        """Both factors."""
        return self.rank * (self.in_features + self.out_features)

    def batch_form(self) -> "LowRank":
        """Of any rank: a solver eliminates it."""
        return replace(self, rank=1)

    def flops_per_token(self) -> int:
        """Two products."""
        return 2 * self.parameter_count()

    def describe(self) -> str:
        """For example ``rank 64``."""
        return f"rank {self.rank}"

    @property
    def closed_form(self) -> bool:
        """A decomposition."""
        return True

    def build(
        self, *, backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LowRankModule":
        """The module; every backend is the same two products."""
        return LowRankModule(self, bias=False, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """The largest rank, rounded down to a multiple of eight where it is larger than that."""
        rank = min(parameters // (in_features + out_features), in_features, out_features)
        aligned = rank - rank % ALIGNED if rank > ALIGNED else rank
        return [cls(in_features, out_features, aligned)] if aligned > 0 else []


class LowRankModule(TermModule):
    """The two layers.

    Attributes:
        down: nn.Linear(in_features, rank) without a bias.
        up: nn.Linear(rank, out_features), with the layer's bias where it has one.
    """

    term: LowRank
    # both layers are quantised as any other nn.Linear is
    int8_factors: ClassVar[Mapping[str, int]] = {}
    multiplies_int8 = True

    def __init__(
        self,
        term: LowRank,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(term)
        self.down = nn.Linear(term.in_features, term.rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(term.rank, term.out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows of random signs in size; the bias starts without effect."""
        with torch.no_grad():
            self.down.weight.normal_(std=self.term.in_features**-0.5)
            self.up.weight.normal_(std=self.term.rank**-0.5)
            if self.up.bias is not None:
                self.up.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Both layers, the bias included."""
        y: Tensor = self._modules["up"](self._modules["down"](x))  # type: ignore[misc]
        return y

    def called(self, x: Tensor) -> Tensor:
        """The same as a call; without its cost, which is a tenth of both products of one token, where nobody watches it."""
        return self(x) if _is_hooked(self) else self.forward(x)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Both products in the dtype of x, and a bias in the place of the own one."""
        inner = linear(x, self.down.weight.to(x.dtype))
        return linear(inner, self.up.weight.to(x.dtype), bias)

    def reference(self, x: Tensor) -> Tensor:
        """Both products, without the bias."""
        return x @ numbers(self.down.weight, x.dtype).t() @ numbers(self.up.weight, x.dtype).t()

    @property
    def is_plain(self) -> bool:
        """Whether both children are still the layers that were built, so that their products may be taken apart."""
        down, up = self._modules["down"], self._modules["up"]
        if not type(down) is type(up) is nn.Linear or _is_hooked(down) or _is_hooked(up):
            return False
        return not (is_int8(down.weight) or is_int8(up.weight))

    def added_to(self, x: Tensor, y: Tensor) -> Tensor:
        """Y [tokens, out_features] plus both products, differentiable; y itself is written over where that is allowed."""
        inner = linear(x, self.down.weight.to(x.dtype))
        # in place: nothing else reads y, and a sum beside it would be one more pass over the outputs
        add_product = torch.addmm if is_transformed() else Tensor.addmm_
        return add_product(y, inner, self.up.weight.to(x.dtype).t())

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add both products, without the bias."""
        down, up = self._weights(x.dtype)
        y.addmm_(linear(x, down), up.t())

    def write_(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write both products and a bias."""
        down, up = self._weights(x.dtype)
        inner = linear(x, down)
        torch.mm(inner, up.t(), out=y) if bias is None else torch.addmm(bias, inner, up.t(), out=y)

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down, up = self.down.weight, self.up.weight
        return (down, up) if down.dtype == up.dtype == dtype else (down.to(dtype), up.to(dtype))

    @torch.no_grad()
    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """Both products, without the bias."""
        return FrozenLowRank(self.down.weight.to(dtype), self.up.weight.to(dtype))

    @torch.no_grad()
    def solve_(self, problem: LeastSquares) -> None:
        """Whitened truncated SVD."""
        self.set_factors_(*truncated_svd(problem.weight, problem.root, self.term.rank, problem.metric))

    @torch.no_grad()
    def set_factors_(self, left: Tensor, right: Tensor) -> None:
        """Take factors [out_features, rank] and [rank, in_features], both of the same norm in every rank."""
        inward, outward = right.norm(dim=1), left.norm(dim=0)
        ratio = (inward / outward).sqrt()
        ratio = ratio.where(ratio.isfinite() & (ratio > 0), 1.0)
        self.up.weight.copy_(left * ratio)
        self.down.weight.copy_(right / ratio[:, None])

    def scale_parameter(self) -> nn.Parameter:
        """The factor on the outputs' side."""
        weight: nn.Parameter = self.up.weight  # type: ignore[assignment]
        return weight


class FrozenLowRank(nn.Module):
    """Two products that nothing changes any more.

    Args:
        down: [rank, in_features].
        up: [out_features, rank].
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = DenseProduct(down), DenseProduct(up)

    def forward(self, x: Tensor) -> Tensor:
        """Both: x [tokens, in_features] -> [tokens, out_features]."""
        return self.biased(x, None)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus a bias [out_features]."""
        y: Tensor = self.up(self.down(x), bias)
        return y


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
