"""2:4 sparsity: of every four neighbouring inputs of an output two have a weight, a pattern that accelerators speed up.

Stored are the kept weights and where they stand, four bits for every two weights; nothing that follows from them. Inputs
that are no multiple of four end in a group of which some inputs do not exist. It stores two weights too: where fewer than
two inputs exist, one of them belongs to an input that does not, is zero, and never has a gradient.

Calls that train nothing keep the matrix for the next one until a weight or a position changes; ``kept`` says how a change
is seen, and what that gives up. On CUDA devices of compute capability 8.0 and later it is kept in the form of
``torch.sparse.to_sparse_semi_structured`` where torch multiplies that, see ``takes_semi_structured``; this has not been run
nor timed. Elsewhere the product is the dense one, so on a CPU a file of about half the size is all there is to gain, and
the kept matrix comes on top in memory.

Fitted in closed form (``operator/pruning``). Wrapped in SPM stages, A · core · B mixes inputs and outputs around the
sparse core so that other weights than single ones can go. The stages start as the identity, so the start is the core by
itself, and are trained by a gradient; without gradients all three are one dense product.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spmconvert.errors import OptionError
from spmconvert.operator.dispatch import Backend
from spmconvert.operator.geometry import Geometry, stage_period
from spmconvert.operator.int8 import is_dynamic, numbers, with_numbers
from spmconvert.operator.kept import can_be_kept
from spmconvert.operator.pruning import GROUP, KEPT, pruned
from spmconvert.operator.reference import is_recorded
from spmconvert.operator.start import identity_stages_
from spmconvert.operator.terms.module import LeastSquares, TermModule, root_mean_square
from spmconvert.operator.terms.spm import Stages, StagesModule
from spmconvert.operator.terms.term import Term

# sizes of which torch's backends for semi-structured matrices all take any multiple in half precision
ROWS_MULTIPLE, INPUTS_MULTIPLE = 32, 64
SPARSE_DEVICE = "cuda"
# coordinates a block of the stages around it, where a recipe names none
WRAP_BLOCK = 8


@dataclass(frozen=True)
class Sparse24(Term):
    """A matrix with two weights in every four inputs of an output.

    Attributes:
        wrap: whether SPM stages stand before and behind it.
        wrap_block: coordinates per block of the stages, 0 without.
        wrap_stages: number of stages on each side, 0 without.
    """

    kind: ClassVar[str] = "sparse24"

    wrap: bool = False
    wrap_block: int = 0
    wrap_stages: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no layer can have."""
        self.require("in_features", 1)
        self.require("out_features", 1)
        if not isinstance(self.wrap, bool):
            raise OptionError(f"wrap of a {self.kind} term is {self.wrap!r}; it must be true or false")
        for name in ("wrap_block", "wrap_stages"):
            self.require(name, int(self.wrap))
            if not self.wrap and getattr(self, name):
                raise OptionError(f"{name} is {getattr(self, name)} and wrap is false; set wrap, or {name} to 0")

    @property
    def groups(self) -> int:
        """Groups of four inputs, the last of which may have fewer."""
        return -(-self.in_features // GROUP)

    @property
    def packed_groups(self) -> int:
        """Bytes that hold the positions of an output's groups, two in each."""
        return -(-self.groups // 2)

    def wrapper(self, features: int) -> Stages:
        """The stages on the side that has so many features."""
        width = -(-features // self.wrap_block) * self.wrap_block
        return Stages.of(Geometry(features, features, width, self.wrap_stages, "general", self.wrap_block))

    def parameter_count(self) -> int:
        """Kept weights, and the stages around them."""
        kept = self.out_features * KEPT * self.groups
        sides = (self.in_features, self.out_features) if self.wrap else ()
        return kept + sum(self.wrapper(features).parameter_count() for features in sides)

    @property
    def closed_form(self) -> bool:
        """A mask and a linear solve, unless stages are fitted around it."""
        return not self.wrap

    @property
    def runs_dense(self) -> bool:
        """There is no faster product on a CPU."""
        return True

    @classmethod
    def from_options(cls, in_features: int, out_features: int, options: dict[str, Any]) -> Self:
        """``wrap`` alone takes stages of ``WRAP_BLOCK`` coordinates and as many as mix all of them."""
        if options.get("wrap") is True:
            block = options.get("wrap_block", WRAP_BLOCK)
            stages = stage_period(-(-max(in_features, out_features) // max(block, 1)))
            options = {"wrap_block": block, "wrap_stages": stages, **options}
        return super().from_options(in_features, out_features, options)

    @classmethod
    def standing_designs(cls, in_features: int, out_features: int) -> list[Self]:
        """The bare matrix."""
        return [cls(in_features, out_features)]

    def index_bytes(self) -> int:
        """Packed positions."""
        return self.out_features * self.packed_groups

    def flops_per_token(self) -> int:
        """Of the dense product, which is what runs but on some accelerators."""
        return 2 * self.dense_parameters

    def describe(self) -> str:
        """For example ``2:4 wrapped, block 8``."""
        return f"2:4 wrapped, block {self.wrap_block}" if self.wrap else "2:4"

    def build(
        self, *, backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Sparse24Module":
        """The module; the backend is that of the stages around it."""
        if self.wrap:
            return WrappedSparse24Module(self, backend=backend, device=device, dtype=dtype)
        return Sparse24Module(self, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """The only size there is, where it is small enough."""
        term = cls(in_features, out_features)
        return [term] if term.parameter_count() <= parameters else []


class Sparse24Module(TermModule):
    """The matrix by itself.

    Attributes:
        values: kept weights in the order of their inputs, [out_features, 2 * groups].
        positions: where in its group of four each stands, as ``pack`` gives it, uint8 [out_features, ceil(groups / 2)].
    """

    # kept weights of an output
    int8_factors: ClassVar[Mapping[str, int]] = {"values": 1}
    multiplies_int8 = True
    term: Sparse24
    positions: Tensor

    def __init__(
        self, term: Sparse24, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(term)
        self.values = nn.Parameter(torch.empty(term.out_features, KEPT * term.groups, device=device, dtype=dtype))
        packed = torch.empty(term.out_features, term.packed_groups, device=device, dtype=torch.uint8)
        self.register_buffer("positions", packed)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights at random positions."""
        term = self.term
        whole, rest = divmod(term.in_features, GROUP)
        size = (KEPT * whole + min(KEPT, rest)) ** -0.5
        weight = self.values.new_empty(term.out_features, GROUP * term.groups).normal_(std=size)
        chance = torch.rand(weight.shape, device=weight.device)
        weight[:, term.in_features :] = 0
        chance[:, term.in_features :] = -1
        first = chance.view(-1, term.groups, GROUP).topk(KEPT).indices
        kept = torch.zeros_like(weight, dtype=torch.bool).view(-1, term.groups, GROUP).scatter(2, first, True)
        self.hold_(weight, kept.flatten(1))

    @torch.no_grad()
    def hold_(self, weight: Tensor, kept: Tensor) -> None:
        """Take over the kept weights of a matrix.

        Args:
            weight: [out_features, 4 * groups]; zero for inputs that do not exist.
            kept: two in every group, bool of the same shape.
        """
        places = kept.unflatten(1, (-1, GROUP)).byte().topk(KEPT).indices.sort().values
        self.values.copy_(weight.unflatten(1, (-1, GROUP)).gather(2, places).flatten(1))
        self.positions.copy_(pack(places))

    def core(self) -> Tensor:
        """The weights at their places, [out_features, in_features], differentiable in them."""
        return placed(numbers(self.values), self.positions, self.term.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """One product: x [tokens, in_features] -> [tokens, out_features]."""
        return self.biased(x, None)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus a bias [out_features]."""
        if is_dynamic(self.values):
            return linear(x, self._int8_matrix(), bias)
        sources = self._sources()
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in sources)
        if trains or is_recorded() or not can_be_kept(self, sources, (self.positions,)):
            return self._differentiable(x, bias)
        return _multiply(x, self._kept_matrix(x, sources), bias)

    def write_(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write the product of a chunk of tokens and a bias over y."""
        matrix = self._matrix_for(x)
        if type(matrix) is not Tensor:
            y.copy_(_multiply(x, matrix, bias))
        elif bias is None:
            torch.mm(x, matrix.t(), out=y)
        else:
            torch.addmm(bias, x, matrix.t(), out=y)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add the product of a chunk of tokens to y."""
        matrix = self._matrix_for(x)
        if type(matrix) is Tensor:
            y.addmm_(x, matrix.t())
        else:
            y.add_(_multiply(x, matrix, None))

    def reference(self, x: Tensor) -> Tensor:
        """The product with the explicit matrix."""
        return x @ self.core().to(x.dtype).t()

    def matrix(self) -> Tensor:
        """The weights at their places, [out_features, in_features], differentiable."""
        return self.core()

    def scale_parameter(self) -> nn.Parameter:
        """The kept weights."""
        return self.values

    @torch.no_grad()
    def solve_(self, problem: LeastSquares) -> None:
        """Choose the mask and refit the weights that stay."""
        self.hold_(*pruned(problem))

    def _sources(self) -> tuple[Tensor, ...]:
        """Parameters that the matrix is made of."""
        return (self.values,)

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.core().to(x.dtype), bias)

    def _matrix_for(self, x: Tensor) -> Tensor:
        sources = self._sources()
        keeps = can_be_kept(self, sources, (self.positions,))
        return self._kept_matrix(x, sources) if keeps else self.matrix().to(x.dtype)

    def _kept_matrix(self, x: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
        make = _semi_structured if self._multiplies_sparsely(x) else _dense
        tensors = (*sources, self.positions)
        return self.keep(x.dtype, make, tensors, lambda: make(self.matrix().to(x.dtype)))[0]

    def _int8_matrix(self) -> Tensor:
        values: Any = self.values

        def make() -> list[Tensor]:
            return [with_numbers(values, placed(values.qdata, self.positions, self.term.in_features).contiguous())]

        if is_recorded() or not can_be_kept(self, (values,), (self.positions,)):
            return make()[0]
        return self.keep(values.dtype, with_numbers, (values, self.positions), make)[0]

    def _multiplies_sparsely(self, x: Tensor) -> bool:
        # the sparse product has no gradient with respect to its input, and needs one
        if torch.is_grad_enabled() or x.device.type != SPARSE_DEVICE or not x.shape[0]:
            return False
        return takes_semi_structured(x.dtype, self.term.out_features, self.term.in_features, _capability(x.device))


class WrappedSparse24Module(Sparse24Module):
    """The matrix between stages.

    Attributes:
        before: stages on the inputs' side.
        behind: stages on the outputs' side.
    """

    starts_near = True
    multiplies_int8 = False

    def __init__(
        self,
        term: Sparse24,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(term, device=device, dtype=dtype)
        self.before = StagesModule(term.wrapper(term.in_features), backend=backend, device=device, dtype=dtype)
        self.behind = StagesModule(term.wrapper(term.out_features), backend=backend, device=device, dtype=dtype)
        self._unwrap_()

    def reset_parameters(self) -> None:
        """Normal weights at random positions between stages that do nothing."""
        super().reset_parameters()
        self._unwrap_()

    def _unwrap_(self) -> None:
        # none while the constructor of the matrix runs
        for side in self.children():
            if isinstance(side, StagesModule):
                identity_(side)

    def reference(self, x: Tensor) -> Tensor:
        """Stage by stage, with the explicit matrix between them."""
        return self.behind.reference(super().reference(self.before.reference(x)))

    def matrix(self) -> Tensor:
        """A · core · B, [out_features, in_features], differentiable."""
        identity = torch.eye(self.term.in_features, dtype=self.values.dtype, device=self.values.device)
        return self._differentiable(identity, None).t()

    def start_(self, problem: LeastSquares, seed: int) -> None:
        """The matrix by itself, solved for; there is nothing random in it."""
        self._unwrap_()
        self.solve_(problem)

    def unknowns(self) -> list[tuple[nn.Parameter, float]]:
        """The kept weights and the stages."""
        return [(self.values, root_mean_square(self.values)), *self.before.unknowns(), *self.behind.unknowns()]

    def drop_cache_(self) -> None:
        """Forget the kept matrix and what the stages keep."""
        super().drop_cache_()
        self.before.drop_cache_()
        self.behind.drop_cache_()

    def _sources(self) -> tuple[Tensor, ...]:
        stages = [(side.weight, side.scale_in, side.scale_out) for side in (self.before, self.behind)]
        return (self.values, *stages[0], *stages[1])

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.behind.biased(super()._differentiable(self.before(x), None), bias)

    def _multiplies_sparsely(self, x: Tensor) -> bool:
        # one dense product is less than a sparse one between two runs of stages
        return False


def pack(places: Tensor) -> Tensor:
    """Two bits a position, the first group's below: [rows, groups, 2] of 0 to 3 -> uint8 [rows, ceil(groups / 2)]."""
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    nibbles = nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, groups: int) -> Tensor:
    """The inverse: int64 [rows, groups, 2]."""
    # first: exporters make int8 of a byte and a number
    packed = packed.long()
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :groups]
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1)


def placed(values: Tensor, positions: Tensor, in_features: int) -> Tensor:
    """Kept weights at their places, as ``Sparse24Module`` has both: [out_features, in_features], differentiable."""
    groups = -(-in_features // GROUP)
    inputs = torch.arange(0, GROUP * groups, GROUP, device=values.device)[:, None] + unpack(positions, groups)
    matrix = values.new_zeros(values.shape[0], GROUP * groups)
    return matrix.scatter(1, inputs.flatten(1), values)[:, :in_features]


def identity_(stages: StagesModule) -> None:
    """Make stages whose two sizes are the same the identity, in place: coordinates beyond the features give nothing."""
    identity_stages_(stages, 0)
    with torch.no_grad():
        stages.scale_in.fill_(1.0)
        stages.scale_out.fill_(1.0)
        stages.scale_out[stages.geometry.out_features :] = 0


def takes_semi_structured(
    dtype: torch.dtype, out_features: int, in_features: int, capability: tuple[int, int] | None
) -> bool:
    """Whether torch multiplies a semi-structured matrix of this kind.

    Args:
        dtype: of the matrix and its inputs.
        out_features: rows of the matrix.
        in_features: its columns.
        capability: compute capability of the device, None where torch has no backend for it.
    """
    fits = out_features % ROWS_MULTIPLE == 0 and in_features % INPUTS_MULTIPLE == 0
    return dtype in (torch.float16, torch.bfloat16) and fits and capability is not None and capability >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.backends.cusparselt.is_available() else None


def _dense(matrix: Tensor) -> list[Tensor]:
    return [matrix.contiguous()]


def _semi_structured(matrix: Tensor) -> list[Tensor]:
    with warnings.catch_warnings():
        # torch says once that its interface is a prototype
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        return [torch.sparse.to_sparse_semi_structured(matrix.contiguous())]


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, matrix, bias) if type(matrix) is Tensor else linear(x.contiguous(), matrix, bias)
