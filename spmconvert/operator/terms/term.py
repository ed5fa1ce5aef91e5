"""What every kind of term answers in integers, without a tensor: sizes, costs, and how it stands in config.json.

A layer is ``y = bias + sum of terms(x)``. A kind of term is one file beside this one and one line in ``registry``: a frozen
dataclass derived from ``Term`` whose fields are its integers, and a ``TermModule`` that it builds. Nothing else of the
tool knows one kind from another, but for low rank, which fits eliminate and layers add in place.

This module does not import torch; the files of the kinds do.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from spmconvert.errors import OptionError

if TYPE_CHECKING:
    import torch

    from spmconvert.operator.dispatch import Backend
    from spmconvert.operator.terms.module import TermModule


@dataclass(frozen=True)
class Term(ABC):
    """A kind of term at one size.

    Attributes:
        in_features: size of the layer's input.
        out_features: size of the layer's output.

    Raises:
        OptionError: when a number is outside its range.
    """

    kind: ClassVar[str]

    in_features: int
    out_features: int

    def require(self, name: str, lowest: int) -> None:
        """Refuse a field that is no integer of at least ``lowest``."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise OptionError(f"{name} of a {self.kind} term is {value!r}; it must be an integer of at least {lowest}")

    @property
    def dense_parameters(self) -> int:
        """Parameters of the matrix that a term stands beside or in place of."""
        return self.in_features * self.out_features

    @abstractmethod
    def parameter_count(self) -> int:
        """Number of stored parameters."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations a token costs as it is executed, two for a multiply and an add."""

    @abstractmethod
    def describe(self) -> str:
        """The term in a few words."""

    @abstractmethod
    def build(
        self, *, backend: "Backend" = "auto", device: "torch.device | str | None" = None, dtype: "torch.dtype | None" = None
    ) -> "TermModule":
        """The module, with fresh parameters."""

    @classmethod
    @abstractmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> "list[Self]":
        """Terms of this kind worth trying with at most that many parameters; the largest of each shape."""

    @classmethod
    def standing_designs(cls, in_features: int, out_features: int) -> "list[Self]":
        """Terms of this kind whose size is the layer's, not the budget's; a budget tries them as they are."""
        return []

    @property
    def closed_form(self) -> bool:
        """Whether the best parameters are found without a solver."""
        return False

    @property
    def runs_dense(self) -> bool:
        """Whether a CPU runs the term as a dense product; a layer with it then keeps its whole matrix, all terms in it."""
        return False

    def batch_form(self) -> "Term":
        """What terms have in common whose layers are solved together: all of it, or all that their modules do not pad."""
        return self

    def index_bytes(self) -> int:
        """Bytes of stored numbers that are no parameters, such as positions."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """The term as plain JSON values, without the layer's sizes."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **{key: own[key] for key in own if key not in ("in_features", "out_features")}}

    @classmethod
    def from_json(cls, in_features: int, out_features: int, entry: dict[str, Any]) -> Self:
        """Read a term back.

        Raises:
            OptionError: when a key is missing or unknown, or a number is outside its range.
        """
        known = {field.name for field in fields(cls)} - {"in_features", "out_features"}
        found = set(entry) - {"kind"}
        if found != known:
            raise OptionError(f"a {cls.kind} term has {sorted(found)}; it needs {sorted(known)}")
        return cls(in_features, out_features, **{key: entry[key] for key in found})

    @classmethod
    def from_options(cls, in_features: int, out_features: int, options: dict[str, Any]) -> Self:
        """The term from what a recipe gives; what is left out takes its default.

        Raises:
            OptionError: when a key is unknown, or a number is outside its range.
        """
        known = [field.name for field in fields(cls) if field.name not in ("in_features", "out_features")]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise OptionError(f"a {cls.kind} term has {unknown}; known are {known}")
        return cls(in_features, out_features, **options)
