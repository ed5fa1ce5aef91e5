"""A layer as a sum of terms, in integers: what stands in a checkpoint's config, and what a budget chooses between.

This module does not import torch; reading a design back imports the files of its terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spmconvert.errors import OptionError
from spmconvert.operator.terms.registry import KINDS, term_from_json, term_from_options
from spmconvert.operator.terms.term import Term


@dataclass(frozen=True)
class Design:
    """The terms of one layer.

    Attributes:
        in_features: size of the layer's input.
        out_features: size of the layer's output.
        terms: at least one, of a kind each, in the order of the registry; low rank is the last.

    Raises:
        OptionError: when the terms are none, or two of a kind.
    """

    in_features: int
    out_features: int
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        """Refuse a sum that no layer can be."""
        kinds = [term.kind for term in self.terms]
        if not kinds or len(set(kinds)) < len(kinds):
            raise OptionError(f"a layer has the terms {kinds}; it needs at least one, and at most one of a kind")
        order = list(KINDS)
        object.__setattr__(self, "terms", tuple(sorted(self.terms, key=lambda term: order.index(term.kind))))

    @classmethod
    def from_json(cls, in_features: int, out_features: int, entries: object) -> "Design":
        """Read a list of terms back.

        Raises:
            OptionError: when it describes no layer.
        """
        if not isinstance(entries, (list, tuple)):
            raise OptionError(f"terms are {entries!r}; they need a list of tables")
        return cls(in_features, out_features, tuple(term_from_json(in_features, out_features, e) for e in entries))

    @classmethod
    def from_options(cls, in_features: int, out_features: int, entries: Sequence[dict[str, Any]]) -> "Design":
        """The terms that a recipe names; numbers that have a default may be left out.

        Raises:
            OptionError: when they describe no layer.
        """
        return cls(in_features, out_features, tuple(term_from_options(in_features, out_features, e) for e in entries))

    def to_json(self) -> list[dict[str, Any]]:
        """The terms as plain JSON values."""
        return [term.to_json() for term in self.terms]

    def term(self, kind: str) -> Term | None:
        """The term of a kind, or None."""
        return next((term for term in self.terms if term.kind == kind), None)

    @property
    def only_low_rank(self) -> bool:
        """Whether the layer is two dense products."""
        return [term.kind for term in self.terms] == ["lowrank"]

    @property
    def is_iterative(self) -> bool:
        """Whether a solver works on it; closed forms take a few decompositions."""
        return any(not term.closed_form for term in self.terms)

    @property
    def runs_dense(self) -> bool:
        """Whether a CPU runs the whole layer as one dense product."""
        return any(term.runs_dense for term in self.terms)

    @property
    def bias_name(self) -> str:
        """Name of the layer's bias parameter, where it has one."""
        return "lowrank.up.bias" if self.term("lowrank") else "bias"

    def parameter_count(self, *, bias: bool) -> int:
        """Number of stored parameters."""
        return sum(term.parameter_count() for term in self.terms) + (self.out_features if bias else 0)

    def stored_bytes(self, item_bytes: int, *, bias: bool) -> int:
        """Bytes in a file of a dtype of ``item_bytes``, indices and the layer's mark included."""
        return (self.parameter_count(bias=bias) + 1) * item_bytes + sum(term.index_bytes() for term in self.terms)

    def flops_per_token(self) -> int:
        """Floating-point operations a token costs."""
        return sum(term.flops_per_token() for term in self.terms)

    def describe(self) -> str:
        """The terms in words."""
        return " + ".join(term.describe() for term in self.terms)


def staged_design(
    in_features: int,
    out_features: int,
    stages: int | None = None,
    variant: Any = "general",
    block: int = 1,
    rank: int = 0,
) -> Design:
    """Stages, low rank, or both, in the numbers that options and recipes give.

    Args:
        in_features: size of the layer's input.
        out_features: size of the layer's output.
        stages: number of stages; None for one pass over all strides, 0 with a rank for low rank alone.
        variant: ``general`` or ``rotation``.
        block: coordinates per block.
        rank: of the low-rank term, 0 for none.

    Raises:
        OptionError: when the numbers describe no layer.
    """
    # these files import torch
    from spmconvert.operator.geometry import Geometry
    from spmconvert.operator.terms.lowrank import LowRank
    from spmconvert.operator.terms.spm import Stages

    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise OptionError(f"rank is {rank!r}; it must be an integer of at least 0")
    geometry = Geometry.create(in_features, out_features, stages, variant, block)
    terms: Sequence[Term] = () if rank and not geometry.stages else (Stages.of(geometry),)
    low_rank = (LowRank(in_features, out_features, rank),) if rank else ()
    return Design(in_features, out_features, (*terms, *low_rank))
