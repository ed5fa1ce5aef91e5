"""Monarch: a grid of independent low-rank blocks, executed as two batched products.

The matrix is cut into blocks_out x blocks_in blocks, each a product of its own two factors of the same rank. The first
product sends every input chunk to what is left of it for each output chunk; the second gathers, for every output chunk,
what all input chunks left: Monarch (Dao et al. 2022) and BlockShuffle (Qiu et al. 2024), with any numbers of blocks. The
permutation between the products is a strided view.

Activations are kept tokens last between the products, and the rows of the first factors in the order (rank, blocks_out).
The first product then reads a transposed view of its input, the second a view of rows that are blocks_out apart, and
on a chunk without gradients it writes into its columns of the output: nothing is copied. At 128 tokens and one core, tokens
first with the permutation as a copy mostly take 1.5 to 2 times as long, and 3.6 times at 2048 -> 8192 with 32 x 128 blocks
of rank 4. Up to four tokens the copy is small and products with so few columns are slow: there they do stand first.

Fitted from block coordinate descent (``operator/blockwise``), then by a gradient. What it gives up: a block is only of low
rank, so directions that all inputs and all outputs share are paid for once in every block. On layers of all-MiniLM-L6-v2
at a quarter of the parameters the start leaves 0.030 of the outputs' energy on 1536 -> 384 where low rank leaves 0.041,
and 0.104 on 384 -> 384 (query) where that leaves 0.117, but 0.165 on 384 -> 1536 where that leaves 0.147. A single row of
blocks, each over all outputs, is the best of the designs in all three, and fewer, larger blocks are better than many small.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from spmconvert.errors import OptionError
from spmconvert.operator.blockwise import Blocks, between, fit_blocks
from spmconvert.operator.dispatch import Backend
from spmconvert.operator.int8 import batched_product, is_dynamic, numbers
from spmconvert.operator.terms.module import LeastSquares, TermModule
from spmconvert.operator.terms.term import Term

# largest rows and columns of the blocks that a budget tries, and the least: smaller ones are slow to multiply
COLUMN_SIZE, GRID_SIZE = 128, 64
LEAST_SIZE = 16
# up to as many tokens stand first between the products
FEW_TOKENS = 4


@dataclass(frozen=True)
class Monarch(Term):
    """A grid of blocks of one rank.

    Attributes:
        blocks_in: number of input chunks, a divisor of in_features.
        blocks_out: number of output chunks, a divisor of out_features.
        rank: of every block.
    """

    kind: ClassVar[str] = "monarch"

    blocks_in: int = 1
    blocks_out: int = 1
    rank: int = 1

    def __post_init__(self) -> None:
        """Refuse a grid that no layer can have."""
        for name in ("blocks_in", "blocks_out", "rank"):
            self.require(name, 1)
        for name, size in (("blocks_in", self.in_features), ("blocks_out", self.out_features)):
            if size % getattr(self, name):
                raise OptionError(f"{name} of a {self.kind} term is {getattr(self, name)}; it must divide {size}")
        if self.rank > min(self.rows, self.columns):
            blocks = f"blocks of {self.rows} x {self.columns}"
            raise OptionError(f"rank of a {self.kind} term is {self.rank}; {blocks} have at most the smaller of the two")

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.out_features // self.blocks_out

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.in_features // self.blocks_in

    def parameter_count(self) -> int:
        """Both factors of every block."""
        return self.rank * (self.blocks_in * self.out_features + self.blocks_out * self.in_features)

    def batch_form(self) -> "Monarch":
        """Of any rank."""
        return replace(self, rank=1)

    def flops_per_token(self) -> int:
        """Two products."""
        return 2 * self.parameter_count()

    def describe(self) -> str:
        """For example ``32 x 18 blocks of rank 4``."""
        return f"{self.blocks_out} x {self.blocks_in} blocks of rank {self.rank}"

    def build(
        self, *, backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "MonarchModule":
        """The module; every backend is the same two products."""
        return MonarchModule(self, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """Whole columns of blocks, and a grid of blocks that are as small as they are useful on both sides.

        Of grids of other sizes none was better by more than a few per cent (docs/results.md).
        """
        grids = [
            (blocks_of(in_features, COLUMN_SIZE), 1),
            (blocks_of(in_features, GRID_SIZE), blocks_of(out_features, GRID_SIZE)),
        ]
        found = [cls._largest(in_features, out_features, parameters, *grid) for grid in dict.fromkeys(grids)]
        return [term for term in found if term is not None]

    @classmethod
    def _largest(
        cls, in_features: int, out_features: int, parameters: int, blocks_in: int | None, blocks_out: int | None
    ) -> Self | None:
        """The grid at the largest rank that fits and is below that of a full block; None where it is block-dense."""
        if blocks_in is None or blocks_out is None or blocks_in == 1:
            return None
        rank = parameters // (blocks_in * out_features + blocks_out * in_features)
        rank = min(rank, in_features // blocks_in - 1, out_features // blocks_out - 1)
        return cls(in_features, out_features, blocks_in, blocks_out, rank) if rank > 0 else None


def both_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """X [tokens, in_features] through the factors that ``MonarchModule`` has -> [tokens, out_features]."""
    inner = between(first, x, second.shape[0])
    # tokens first here: what is left is to copy rows, which is faster than to transpose them
    y = torch.bmm(inner.mT, second.mT)
    return y.transpose(0, 1).reshape(x.shape[0], second.shape[0] * second.shape[1])


def blocks_of(features: int, size: int) -> int | None:
    """The fewest chunks of at most ``size`` and at least ``LEAST_SIZE`` features, or None where no divisor gives such."""
    fitting = (count for count in range(-(-features // size), features // LEAST_SIZE + 1) if features % count == 0)
    return next(fitting, None)


class MonarchModule(TermModule):
    """The factors of all blocks.

    Attributes:
        first: [blocks_in, rank * blocks_out, columns], rows in the order (rank, blocks_out).
        second: [blocks_out, rows, blocks_in * rank], columns in the order (blocks_in, rank).
    """

    starts_near = True
    int8_factors: ClassVar[Mapping[str, int]] = {"first": 2, "second": 2}
    multiplies_int8 = True
    term: Monarch

    def __init__(
        self, term: Monarch, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(term)
        first = (term.blocks_in, term.rank * term.blocks_out, term.columns)
        second = (term.blocks_out, term.rows, term.blocks_in * term.rank)
        self.first = nn.Parameter(torch.empty(first, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(second, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors in size."""
        with torch.no_grad():
            self.first.normal_(std=self.first.shape[-1] ** -0.5)
            self.second.normal_(std=self.second.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Both products."""
        if is_dynamic(self.first):
            y = batched_product(self._gathered(batched_product(self._chunks(x), self.first)), self.second)
            return y.transpose(0, 1).reshape(x.shape[0], self.term.out_features)
        return both_products(x, numbers(self.first, x.dtype), numbers(self.second, x.dtype))

    def write_(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write both products, and a bias while they are in cache."""
        target, left, right = self._last_product(x, y)
        torch.bmm(left, right, out=target)
        if bias is not None:
            y.add_(bias)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add both products in place."""
        target, left, right = self._last_product(x, y)
        target.baddbmm_(left, right)

    def _last_product(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where in y [tokens, out_features] the second product belongs, and its two operands."""
        term, first, second = self.term, numbers(self.first, x.dtype), numbers(self.second, x.dtype)
        target = y.unflatten(1, (term.blocks_out, term.rows)).transpose(0, 1)
        if x.shape[0] > FEW_TOKENS:
            return target.mT, second, between(first, x, term.blocks_out)
        return target, self._gathered(torch.bmm(self._chunks(x), first.mT)).contiguous(), second.mT

    def _chunks(self, x: Tensor) -> Tensor:
        """Inputs of the first product with tokens first: [blocks_in, tokens, columns]."""
        return x.unflatten(1, (self.term.blocks_in, self.term.columns)).transpose(0, 1)

    def _gathered(self, h: Tensor) -> Tensor:
        """Inputs of the second one: [blocks_in, tokens, rank * blocks_out] -> [blocks_out, tokens, blocks_in * rank]."""
        term = self.term
        apart = h.view(term.blocks_in, -1, term.rank, term.blocks_out).permute(3, 1, 0, 2)
        return apart.reshape(term.blocks_out, -1, term.blocks_in * term.rank)

    def reference(self, x: Tensor) -> Tensor:
        """Both products as sums over named indices."""
        blocks = self.blocks()
        chunks = x.unflatten(1, (self.term.blocks_in, self.term.columns))
        inner = torch.einsum("iajp,tip->tjia", blocks.first.to(x.dtype), chunks)
        return torch.einsum("jqia,tjia->tjq", blocks.second.to(x.dtype), inner).flatten(1)

    def matrix(self) -> Tensor:
        """All blocks multiplied out."""
        return self.blocks().matrix()

    def blocks(self) -> Blocks:
        """The parameters with all their indices apart."""
        term = self.term
        first = numbers(self.first).unflatten(1, (term.rank, term.blocks_out))
        return Blocks(first, numbers(self.second).unflatten(2, (term.blocks_in, term.rank)))

    def scale_parameter(self) -> nn.Parameter:
        """The factors on the outputs' side."""
        return self.second

    def padded(self, tensors: dict[str, Tensor], term: Term) -> dict[str, Tensor]:
        """With ranks of zeros in both factors behind the others: what one makes of inputs the other takes nothing of."""
        missing = _rank_of(term) - self.term.rank
        first = tensors["first"].unflatten(1, (self.term.rank, self.term.blocks_out))
        second = tensors["second"].unflatten(2, (self.term.blocks_in, self.term.rank))
        first = pad(first, (0, 0, 0, 0, 0, missing))
        return {"first": first.flatten(1, 2), "second": pad(second, (0, missing)).flatten(2)}

    def cut(self, tensors: dict[str, Tensor], term: Term) -> dict[str, Tensor]:
        """Without the ranks that were added."""
        rank = _rank_of(term)
        first = tensors["first"].unflatten(1, (rank, self.term.blocks_out))[:, : self.term.rank]
        second = tensors["second"].unflatten(2, (self.term.blocks_in, rank))[..., : self.term.rank]
        return {"first": first.flatten(1, 2), "second": second.flatten(2)}

    @torch.no_grad()
    def start_(self, problem: LeastSquares, seed: int) -> None:
        """Block coordinate descent; the same for every seed."""
        term = self.term
        self.set_blocks_(fit_blocks(problem, term.blocks_in, term.blocks_out, term.rank))

    @torch.no_grad()
    def set_blocks_(self, blocks: Blocks) -> None:
        """Take factors, both of the same norm in every rank of every block, so that steps of one size suit them."""
        inward, outward = blocks.first.norm(dim=3), blocks.second.norm(dim=1).permute(1, 2, 0)
        ratio = (inward / outward).sqrt()
        ratio = ratio.where(ratio.isfinite() & (ratio > 0), 1.0)
        self.first.copy_((blocks.first / ratio[..., None]).flatten(1, 2))
        self.second.copy_((blocks.second * ratio.permute(2, 0, 1)[:, None]).flatten(2))


def _rank_of(term: Term) -> int:
    assert isinstance(term, Monarch)
    return term.rank
