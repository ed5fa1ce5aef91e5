"""Widths, strides, pairings, merge groups and parameter counts of an SPM layer, in integers only.

Everything about the operator that does not need a tensor stands here, once: the checkpoint format, the planner, the
parameter budget and the kernels all ask this module. It does not import torch, so that options and recipes can be checked
before any slow import.

Coordinates 0 … width-1 are grouped in ``blocks = width / block`` consecutive blocks. Stage l has the stride
``2 ** (l mod K)`` in blocks, K = ceil(log2 blocks); block i is paired with ``i XOR stride`` where that exists and stays
unpaired where it does not (arXiv 2512.23905, section 3, extended to widths that are not powers of two).

A run of consecutive stages acts within groups of coordinates and is therefore a block-diagonal matrix after a
permutation. ``merge_groups`` cuts the stages into such runs. A run over the exponents [low, high) writes i as
(outer, middle, inner) with ``inner < 2**low``; only ``middle`` changes. The run that reaches the last exponent keeps
``outer = 1`` and lets ``middle`` take ``blocks / 2**low`` values, which need not be a power of two: 768 = 24 x 32.
That is why ``padded_width`` rounds a width up to a multiple of the last run's ``2**low``, and to nothing more.
"""

import math
from dataclasses import dataclass
from typing import Literal

from spmconvert.errors import OptionError

Variant = Literal["general", "rotation"]
VARIANTS: tuple[Variant, ...] = ("general", "rotation")

# up to this many blocks, all stages merge into one dense matrix, which is cheaper than two groups and a transpose
SINGLE_GROUP_BLOCKS = 64
# up to this many blocks two groups are cheapest; above, a third group saves more than its pass over memory costs
TWO_GROUP_BLOCKS = 8192


@dataclass(frozen=True)
class MergeGroup:
    """A run of consecutive stages that is one block-diagonal matrix.

    Attributes:
        first_stage: index of the first stage in the run.
        stages: number of stages in the run.
        outer: number of values of the part of the block index above the run.
        middle: number of values of the part that the run mixes.
        inner: number of values of the part below the run.
    """

    first_stage: int
    stages: int
    outer: int
    middle: int
    inner: int


# stages, and width in what it has to hold: beyond what anybody builds, so that a damaged file is refused in no time
MOST_STAGES, WIDEST = 4096, 4


@dataclass(frozen=True)
class Geometry:
    """The shape of one SPM layer, as it stands in a checkpoint's config.

    Attributes:
        in_features: size of the layer's input.
        out_features: size of the layer's output.
        width: number of coordinates the stages mix, n in the paper; at least max(in_features, out_features).
        stages: number of stages, L in the paper.
        variant: ``general`` (free 2 x 2 mixers) or ``rotation`` (one angle a pair).
        block: coordinates per block; a general stage mixes a pair of blocks by a dense 2 block x 2 block matrix.

    Raises:
        OptionError: when a number is outside its range, or the width does not fit the other numbers.
    """

    in_features: int
    out_features: int
    width: int
    stages: int
    variant: Variant = "general"
    block: int = 1

    def __post_init__(self) -> None:
        """Refuse a geometry that no layer can have."""
        for name, lowest in (("in_features", 1), ("out_features", 1), ("width", 1), ("stages", 0), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise OptionError(f"{name} is {value!r}; it must be an integer of at least {lowest}")
        if self.variant not in VARIANTS:
            raise OptionError(f"variant is {self.variant!r}; choose one of {', '.join(VARIANTS)}")
        if self.variant == "rotation" and self.block != 1:
            raise OptionError(f"variant rotation mixes single coordinates, block is {self.block}; use variant general")
        if self.stages > MOST_STAGES:
            raise OptionError(f"stages is {self.stages}; a layer can have {MOST_STAGES} at most")
        largest = max(self.in_features, self.out_features)
        if self.width > WIDEST * max(largest, self.block):
            raise OptionError(
                f"width is {self.width}; it can be {WIDEST} times the larger of features and block at most, that is "
                f"{WIDEST * max(largest, self.block)}"
            )
        if self.width < largest or self.width % self.block:
            raise OptionError(f"width is {self.width}; it must be a multiple of block {self.block} and at least {largest}")

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        stages: int | None = None,
        variant: Variant = "general",
        block: int = 1,
    ) -> "Geometry":
        """Choose the width, and the number of stages where none is given: one pass over all strides."""
        if block < 1 or min(in_features, out_features) < 1:
            raise OptionError(f"in_features {in_features}, out_features {out_features} and block {block} must be >= 1")
        width = padded_width(max(in_features, out_features), block)
        chosen = stage_period(width // block) if stages is None else stages
        return cls(in_features, out_features, width, chosen, variant, block)

    @property
    def blocks(self) -> int:
        """Number of blocks of coordinates."""
        return self.width // self.block

    @property
    def pairs(self) -> int:
        """Number of angles stored for one rotation stage; a stage with unpaired coordinates uses fewer."""
        return self.width // 2

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that holds all stages; never two-dimensional, so it cannot pass for a dense weight."""
        if self.variant == "rotation":
            return (self.stages, 1, self.pairs)
        return (self.stages, 2, self.blocks, self.block, self.block)

    def parameter_count(self) -> int:
        """Number of stored parameters: stages and both diagonals."""
        return math.prod(self.weight_shape()) + 2 * self.width

    def flops_per_token(self) -> int:
        """Floating-point operations a token costs in the merged form, two for a multiply and an add."""
        groups = merge_groups(self.blocks, self.stages)
        if not groups:
            return 2 * self.width
        merged = 2 * self.width * self.block * sum(group.middle for group in groups)
        one_matrix = len(groups) == 1 and groups[0].outer == groups[0].inner == 1
        return 2 * self.in_features * self.out_features if one_matrix else merged


def stage_period(blocks: int) -> int:
    """Number of distinct strides K = ceil(log2 blocks); one for a single block, so that it has a stage too."""
    return max(1, (blocks - 1).bit_length())


def stage_exponent(stage: int, blocks: int) -> int:
    """Exponent k of the stride 2**k of a stage: ascending, then again from 0."""
    return stage % stage_period(blocks)


def padded_width(largest: int, block: int = 1) -> int:
    """Round a layer's larger side up to a width that its merge groups divide.

    Where there are two groups the rounding is the one that makes the merged form cheapest: width times the sum of the
    group sizes; where there are three it follows from their sizes. 768 stays as it is, 11008 becomes 11264 = 32 * 32 * 11.
    """
    blocks = -(-largest // block)
    if blocks <= SINGLE_GROUP_BLOCKS:
        return blocks * block
    if blocks > TWO_GROUP_BLOCKS:
        unit = 1 << _low_bits_of_three(blocks)
        return -(-blocks // unit) * unit * block

    def cost(bits: int) -> int:
        top = -(-blocks >> bits)
        return (top << bits) * (top + (1 << bits))

    best = min(range(1, stage_period(blocks)), key=cost)
    return -(-blocks // (1 << best)) * (1 << best) * block


def _low_bits_of_three(blocks: int) -> int:
    """Exponents below the top group where three groups are used: two thirds of all, split evenly by the caller."""
    return 2 * (stage_period(blocks) // 3) + (2 if stage_period(blocks) % 3 == 2 else 0)


def _cuts(blocks: int) -> list[int]:
    """Exponents at which a pass over all strides is cut into groups; the last one divides the number of blocks."""
    if blocks <= SINGLE_GROUP_BLOCKS:
        return [0]
    trailing = (blocks & -blocks).bit_length() - 1
    if blocks > TWO_GROUP_BLOCKS:
        low = min(_low_bits_of_three(blocks), trailing)
        return sorted({0, low // 2, low})
    # of equal sums the longer low digit wins: it is what the output is written in runs of
    bits = range(min(trailing, stage_period(blocks) - 1), -1, -1)
    return sorted({0, min(bits, key=lambda low: (blocks >> low) + (1 << low))})


def merge_groups(blocks: int, stages: int) -> list[MergeGroup]:
    """Cut the stages into runs that merge into block-diagonal matrices, in the order in which they are applied."""
    period, cuts = stage_period(blocks), _cuts(blocks)
    groups: list[MergeGroup] = []
    for start in range(0, stages, period):
        length = min(period, stages - start)
        for low, high in zip(cuts, [*cuts[1:], period], strict=True):
            high = min(high, length)
            if low >= high:
                break
            inner = 1 << low
            middle = 1 << (high - low) if blocks % (1 << high) == 0 else blocks // inner
            groups.append(MergeGroup(start + low, high - low, blocks // inner // middle, middle, inner))
    return groups
