"""SPM stages: fold · D_out · B_L ··· B_2 · B_1 · D_in · expand, the paper's operator extended to any sizes and to blocks.

The module owns the parameters and their initialisation and chooses who computes; the arithmetic is in ``reference``,
``merged`` and ``triton``. There are no buffers: pairings follow from integers, so nothing can come back uninitialised.

Calls that train no stage keep the merged blocks for the next one until a parameter changes; ``kept`` says how a change is
seen. What it gives up: writes through ``parameter.data`` are not seen, so call ``train()`` or ``eval()`` after such a
write. Graphs made by ``torch.compile`` merge at every call.

In int8 all mixers of a half of a stage share a scale. On fitted layers of all-MiniLM-L6-v2 that moves the matrix by 0.03 to
0.044 of its norm, where low rank and 2:4 move by 0.005; a scale for every 64 mixers would make it 0.02 to 0.03.

Fitted by a gradient through the merged form, from random rotations, or from the hierarchical factorisation where the
layer can be a plain butterfly (``start``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from spmconvert.errors import OptionError
from spmconvert.operator.dispatch import Backend, resolve_backend
from spmconvert.operator.geometry import Geometry, Variant
from spmconvert.operator.int8 import numbers
from spmconvert.operator.kept import Merge, can_be_kept
from spmconvert.operator.merged import MergePlan, apply_blocks, merge_plan, merge_stages, write_blocks
from spmconvert.operator.product import DenseProduct
from spmconvert.operator.reference import is_recorded, reference_forward
from spmconvert.operator.start import can_factorise, hierarchical_start_, random_start_
from spmconvert.operator.terms.module import LeastSquares, TermModule, root_mean_square
from spmconvert.operator.terms.term import Term
from spmconvert.operator.triton.merge import merge_stages_triton
from spmconvert.operator.triton.mix import apply_blocks_triton

# stages and two diagonals
PARAMETERS = 3
# share of the energy that a factorisation may miss and still count as exact up to rounding
EXACT = 1e-10


@dataclass(frozen=True)
class Stages(Term):
    """Stages of one width; see ``Geometry`` for the fields.

    Raises:
        OptionError: when the numbers describe no layer.
    """

    kind: ClassVar[str] = "spm"

    width: int = 0
    stages: int = 0
    variant: Variant = "general"
    block: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that no layer can have."""
        object.__setattr__(self, "_geometry", Geometry(*self._numbers()))

    def _numbers(self) -> tuple[int, int, int, int, Variant, int]:
        return self.in_features, self.out_features, self.width, self.stages, self.variant, self.block

    @property
    def geometry(self) -> Geometry:
        """The same numbers with all that follows from them."""
        found: Geometry = self.__dict__["_geometry"]
        return found

    @classmethod
    def of(cls, geometry: Geometry) -> Self:
        """The term of a geometry."""
        g = geometry
        return cls(g.in_features, g.out_features, g.width, g.stages, g.variant, g.block)

    @classmethod
    def from_options(cls, in_features: int, out_features: int, options: dict[str, Any]) -> Self:
        """``stages``, ``variant`` and ``block``; the width follows where it is not given."""
        if "width" in options:
            return super().from_options(in_features, out_features, options)
        known = ("stages", "variant", "block")
        if unknown := sorted(set(options) - set(known)):
            raise OptionError(f"a spm term has {unknown}; known are {[*known, 'width']}")
        return cls.of(Geometry.create(in_features, out_features, **options))

    def parameter_count(self) -> int:
        """Stages and both diagonals."""
        return self.geometry.parameter_count()

    def flops_per_token(self) -> int:
        """In the merged form."""
        return self.geometry.flops_per_token()

    def describe(self) -> str:
        """For example ``11 stages, general, block 4``."""
        if not self.stages:
            return "a diagonal"
        block = f", block {self.block}" if self.block > 1 else ""
        return f"{self.stages} stage{'s' * (self.stages > 1)}, {self.variant}{block}"

    def build(
        self, *, backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "StagesModule":
        """The module, from rows of random rotations."""
        return StagesModule(self, backend=backend, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """One pass of single coordinates, and the widest blocks whose single stage is small enough.

        A second pass gains nothing beside low rank (docs/results.md).
        """
        geometries = [Geometry.create(in_features, out_features)]
        blocks = [2**power for power in range(1, min(in_features, out_features).bit_length() - 1)]
        wide = [Geometry.create(in_features, out_features, 1, "general", block) for block in blocks]
        fitting = [geometry for geometry in wide if geometry.parameter_count() <= parameters]
        geometries += fitting[-1:]
        return [cls.of(geometry) for geometry in geometries if geometry.parameter_count() <= parameters]


class StagesModule(TermModule):
    """The stages with their parameters.

    Attributes:
        weight: stages, [stages, 2, blocks, block, block] (general) or [stages, 1, width // 2] (rotation, in radians).
        scale_in: D_in, [width].
        scale_out: D_out, [width].
        backend: who computes.
    """

    # all mixers, or angles, of a half of a stage; the diagonals stay as they are
    int8_factors: ClassVar[Mapping[str, int]] = {"weight": 2}
    term: Stages

    def __init__(
        self,
        term: Stages,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(term)
        self.geometry = term.geometry
        self.plan = merge_plan(term.geometry)
        self.backend: Backend = backend
        resolve_backend("auto" if backend == "triton" else backend, "cpu")
        self.weight = nn.Parameter(torch.empty(term.geometry.weight_shape(), device=device, dtype=dtype))
        self.scale_in = nn.Parameter(torch.empty(term.width, device=device, dtype=dtype))
        self.scale_out = nn.Parameter(torch.empty(term.width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from rows of random rotations, which keep the inputs' variance."""
        geometry = self.geometry
        with torch.no_grad():
            angles = torch.empty_like(self.weight[:, 0]).uniform_(-torch.pi, torch.pi)
            if geometry.variant == "rotation":
                self.weight[:, 0] = angles
            else:
                # rows of a random orthogonal 2 x 2 matrix, spread over dense mixers where block > 1
                self.weight[:, 0] = angles.cos() * geometry.block**-0.5
                self.weight[:, 1] = angles.sin() * geometry.block**-0.5
            self.scale_in.fill_(1.0)
            self.scale_out.fill_((geometry.out_features / geometry.width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stages to x [tokens, in_features] -> [tokens, out_features]."""
        return self.biased(x, None)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus a bias [out_features], which costs nothing extra where blocks are merged."""
        # read once: a parametrization computes them at every access
        parameters = (self.weight, self.scale_in, self.scale_out)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        compiles = is_recorded()
        step_tokens = x.shape[0] if trains and not compiles else None
        backend = resolve_backend(self.backend, x.device.type, tokens=step_tokens)
        # an empty chain has nothing to merge: the operator is a diagonal
        if backend == "reference" or self.geometry.stages == 0:
            weight, scale_in, scale_out = parameters
            y = reference_forward(x, numbers(weight), scale_in, scale_out, self.geometry)
            return y if bias is None else y + bias
        by_triton = backend == "triton"
        merge = merge_stages_triton if by_triton else merge_stages
        keeps = not trains and not compiles and can_be_kept(self, parameters)
        blocks = (self._kept_blocks if keeps else self._new_blocks)(x.dtype, merge, parameters)
        return (apply_blocks_triton if by_triton else apply_blocks)(x, blocks, bias, self.plan)

    def write_(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write the stages of a chunk of tokens and a bias over y."""
        held, kept = self._parameters, self._cache
        # what serves was made by this way of merging, from parameters that may be followed
        followed = kept is not None and self.backend in ("auto", "merged") and len(held) == PARAMETERS
        if followed and kept.serve(x.dtype, merge_stages, tuple(held.values())):  # type: ignore[union-attr, arg-type]
            write_blocks(x, kept.blocks, bias, self.plan, y)  # type: ignore[union-attr]
        else:
            self._write_anew(x, bias, y)

    def _write_anew(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        parameters = (self.weight, self.scale_in, self.scale_out)
        merges = resolve_backend(self.backend, x.device.type) == "merged" and self.geometry.stages > 0
        if not merges or x.device.type != "cpu" or not can_be_kept(self, parameters):
            y.copy_(self.biased(x, bias))
        else:
            write_blocks(x, self._kept_blocks(x.dtype, merge_stages, parameters), bias, self.plan, y)

    def _new_blocks(self, dtype: torch.dtype, merge: Merge, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        return [block.to(dtype) for block in merge(*map(numbers, parameters), self.plan)]

    def _kept_blocks(self, dtype: torch.dtype, merge: Merge, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        return self.keep(dtype, merge, parameters, lambda: self._new_blocks(dtype, merge, parameters))

    def reference(self, x: Tensor) -> Tensor:
        """Stage by stage."""
        return reference_forward(x, numbers(self.weight), self.scale_in, self.scale_out, self.geometry)

    @torch.no_grad()
    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """The merged blocks alone; a diagonal has none and stays as it is."""
        if self.geometry.stages == 0:
            return super().frozen(dtype)
        blocks = self._new_blocks(dtype, merge_stages, (self.weight, self.scale_in, self.scale_out))
        return DenseProduct(blocks[0]) if self.plan.dense else FrozenStages(blocks, self.plan)

    def scale_parameter(self) -> nn.Parameter:
        """The diagonal on the outputs' side."""
        return self.scale_out

    def start_(self, problem: LeastSquares, seed: int) -> None:
        """The hierarchical factorisation where it is exact, random rotations otherwise."""
        if can_factorise(self.geometry):
            hierarchical_start_(self, problem.weight)
            with torch.no_grad():
                left, whole = (
                    (part @ problem.root.t()).square().sum() for part in (problem.weight - self.matrix(), problem.weight)
                )
            if left <= EXACT * whole:
                return
        random_start_(self, seed)

    def unknowns(self) -> list[tuple[nn.Parameter, float]]:
        """Mixers are stepped relative to their size; diagonals and angles have size one by construction."""
        mixers = root_mean_square(self.weight) * 2**0.5 if self.geometry.variant == "general" else 1.0
        return [(self.weight, mixers), (self.scale_in, 1.0), (self.scale_out, 1.0)]


class FrozenStages(nn.Module):
    """Stages as merged blocks that nothing changes any more.

    Attributes:
        blocks: as ``merge_stages`` gives them, in the dtype of the inputs.
        plan: merged form of the stages.
    """

    def __init__(self, blocks: list[Tensor], plan: MergePlan) -> None:
        super().__init__()
        self.blocks = nn.ParameterList(nn.Parameter(block, requires_grad=False) for block in blocks)
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stages to x [tokens, in_features] -> [tokens, out_features]."""
        return self.biased(x, None)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus a bias [out_features]."""
        return apply_blocks(x, list(self.blocks), bias, self.plan)
