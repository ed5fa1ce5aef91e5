"""Block-dense: a low-rank product whose second factor is block-diagonal, or Monarch with one input chunk.

Every chunk of outputs has a low-rank matrix of its own, over all inputs. Without a metric on the outputs the fit is exact,
which Monarch's is not: each row block's own whitened truncated SVD. With one, row blocks are weighed by its diagonal
blocks, and only the second factors see the rest of it (``operator/blockwise``).

What it gives up: directions that several chunks of outputs read are stored once for each of them. On layers of
all-MiniLM-L6-v2 that costs more than it brings, the more the more chunks: at a quarter of the parameters of 384 -> 1536
low rank leaves 0.147 of the outputs' energy, 2 chunks 0.163, 4 chunks 0.190, 12 chunks 0.259; on 1536 -> 384 it is 0.041,
and 0.051, 0.060, 0.078. Few chunks are therefore among the designs.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from spmconvert.operator.dispatch import Backend
from spmconvert.operator.terms.module import LeastSquares
from spmconvert.operator.terms.monarch import COLUMN_SIZE, LEAST_SIZE, Monarch, MonarchModule, blocks_of


@dataclass(frozen=True)
class BlockDense(Monarch):
    """A chunk of outputs has a matrix of one rank each; ``blocks_in`` is no field here."""

    kind: ClassVar[str] = "blockdense"

    blocks_in: ClassVar[int] = 1  # type: ignore[misc]

    @property
    def closed_form(self) -> bool:
        """A decomposition a chunk."""
        return True

    def describe(self) -> str:
        """For example ``32 row blocks of rank 4``."""
        return f"{self.blocks_out} row blocks of rank {self.rank}"

    def build(
        self, *, backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "BlockDenseModule":
        """The module; every backend is the same two products."""
        return BlockDenseModule(self, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """About two chunks, about four, and chunks of the largest size that Monarch has."""
        sizes = (out_features // 2, out_features // 4, COLUMN_SIZE)
        counts = dict.fromkeys(blocks_of(out_features, size) for size in sizes if size >= LEAST_SIZE)
        found = [
            cls._at(in_features, out_features, parameters, count) for count in counts if count is not None and count > 1
        ]
        return [term for term in found if term is not None]

    @classmethod
    def _at(cls, in_features: int, out_features: int, parameters: int, blocks_out: int) -> Self | None:
        rank = parameters // (out_features + blocks_out * in_features)
        rank = min(rank, in_features - 1, out_features // blocks_out - 1)
        return cls(in_features, out_features, blocks_out=blocks_out, rank=rank) if rank > 0 else None


class BlockDenseModule(MonarchModule):
    """The factors of all row blocks."""

    term: BlockDense

    def solve_(self, problem: LeastSquares) -> None:
        """The best parameters; without a metric exactly those."""
        self.start_(problem, seed=0)
