"""What every term's module does: apply itself fast and plainly, add itself in place, be fitted.

``forward`` is differentiable and fast; ``reference`` is the plain form that it is tested against. ``add_`` is what a layer
calls on a chunk of tokens while it is in cache, without gradients.

A term is fitted in one of two ways. One whose integers say ``closed_form`` solves for its best self, given what the other
terms leave. Any other is fitted by a gradient: it names its ``unknowns`` and where to start. Both work in the norm of
``LeastSquares``.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from spmconvert.operator.kept import Keeper
from spmconvert.operator.terms.term import Term


class OutputNorm(Protocol):
    """How much directions of the outputs matter, as a symmetric matrix C."""

    def root(self, outputs: Tensor) -> Tensor:
        """Rows [rows, out_features] times C^(1/2)."""
        ...

    def times(self, outputs: Tensor) -> Tensor:
        """Rows [rows, out_features] times C."""
        ...

    def inverse_root(self, outputs: Tensor) -> Tensor:
        """Rows [rows, out_features] times C^(-1/2)."""
        ...


@dataclass(frozen=True)
class LeastSquares:
    """Find S so that ‖R (W - S)ᵀ C^(1/2)‖² is least.

    Attributes:
        weight: W, [out_features, in_features], float32.
        root: R with RᵀR the second moment of the inputs, [rows, in_features], float32.
        metric: C, or None for the identity.
    """

    weight: Tensor
    root: Tensor
    metric: OutputNorm | None = None

    def leaving(self, weight: Tensor) -> "LeastSquares":
        """The same problem for another W."""
        return LeastSquares(weight, self.root, self.metric)


class TermModule(Keeper):
    """A term with its parameters.

    Attributes:
        term: its integers.
    """

    # whether ``start_`` ends near the best parameters
    starts_near: ClassVar[bool] = False
    # parameters that int8 takes, with the number of leading axes whose slices have a scale each; all that reads them goes
    # through ``int8.numbers``. None for a kind that has no such form
    int8_factors: ClassVar[Mapping[str, int] | None] = None
    # whether its products can be made in int8 as well
    multiplies_int8: ClassVar[bool] = False

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term

    def __call__(self, x: Tensor) -> Tensor:
        """Typed: a module's call returns anything."""
        y: Tensor = super().__call__(x)
        return y

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fresh random parameters that keep the inputs' variance, alone in a layer."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the term: x [tokens, in_features] -> [tokens, out_features], differentiable."""

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``forward`` plus a bias [out_features]."""
        y = self(x)
        return y if bias is None else y + bias

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """The same, plainly."""

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add the term of x [tokens, in_features] to y [tokens, out_features] in place, without gradients."""
        y.add_(self(x))

    def write_(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write the term of x [tokens, in_features] and a bias over y [tokens, out_features], without gradients."""
        if bias is None:
            y.copy_(self(x))
        else:
            torch.add(self(x), bias, out=y)

    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """What computes the same, ``biased`` included, where nothing is trained any more; the term may become it.

        Here the term itself. A kind that makes something of its parameters at a call makes it once instead: graphs of
        ``torch.compile`` keep nothing from one call to the next.

        Args:
            dtype: of the inputs to come.
        """
        return self.to(dtype).requires_grad_(False)

    def matrix(self) -> Tensor:
        """The matrix that the term multiplies by, [out_features, in_features], differentiable."""
        parameter = next(self.parameters())
        identity = torch.eye(self.term.in_features, dtype=parameter.dtype, device=parameter.device)
        return self.reference(identity).t()

    @abstractmethod
    def scale_parameter(self) -> nn.Parameter:
        """A parameter that the term's matrix is proportional to."""

    def solve_(self, problem: LeastSquares) -> None:
        """Take the best parameters for a problem; for terms that have a ``closed_form``."""
        raise NotImplementedError(f"a {self.term.kind} term says that it has a closed form, and defines no solve_")

    def start_(self, problem: LeastSquares, seed: int) -> None:
        """Take parameters that a solver may start from, the same for the same seed on any machine; for all others."""
        raise NotImplementedError(f"a {self.term.kind} term has no closed form, and defines no start_ for a solver")

    def padded(self, tensors: dict[str, Tensor], term: Term) -> dict[str, Tensor]:
        """Tensors of the unknowns, by name, in the sizes of a larger term of the same ``batch_form``.

        What is added is zeros, to which neither outputs nor gradients are due.
        """
        return tensors

    def cut(self, tensors: dict[str, Tensor], term: Term) -> dict[str, Tensor]:
        """The inverse."""
        return tensors

    def unknowns(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters that a solver changes, each with the size that its steps are relative to."""
        return [(parameter, root_mean_square(parameter)) for parameter in self.parameters()]


def root_mean_square(parameter: Tensor) -> float:
    """Size of a tensor's numbers; one for zeros."""
    return parameter.detach().float().square().mean().sqrt().item() or 1.0
