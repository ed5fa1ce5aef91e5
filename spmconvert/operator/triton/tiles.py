"""Sizes of the Triton kernels' tiles: for every shape a few candidates from one small table; integers only.

A tile is rounded up to powers of two and to what a matrix unit multiplies. Two things decide: a pass whose batches
interleave in memory (``inner > 1``) takes as many neighbouring batches as fill a sector of 32 bytes, a contiguous one
takes few batches and more tokens; and float32 is multiplied on the ordinary units, where large tiles only cost registers.

Every entry compiles without spills and within the shared memory of both architectures that are checked (sm_80 and
sm_90); ``tests/operator/triton/test_kernels_compile.py`` proves that, and the shared memory that stands beside it. The
first entry of a kind runs where nothing can be timed. Nothing here has been timed: which entry is the fastest is found on
the device (``tuning``).
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

from spmconvert.errors import BackendError

# up to this many tokens the time goes into reading the blocks, and every token has a program of its own
FEW_TOKENS = 16
# columns of a block that the kernel for few tokens holds at once
FEW_TOKENS_COLUMNS = 1024
# widest row of which a tile of tokens fits in the shared memory or the first-level cache of one multiprocessor
FUSED_WIDTH = 2048
# a fused launch has one program for each tile of tokens; with fewer tokens it would leave most multiprocessors idle
FUSED_TOKENS = 2048
# warps for each multiprocessor that the tokens are shared out to
WARPS = 16
# columns of a block that one program merges, and the largest block for which its rows stay in registers
MERGED_COLUMNS = 16
MERGED_SIDE = 128
SECTOR_BYTES = 32
SMALLEST_SIDE = 16


class Pass(NamedTuple):
    """One group of stages as the kernels see it; the constants PASS of ``kernels``.

    Attributes:
        batches: number of blocks.
        columns: coordinates a block reads.
        rows: coordinates a block writes.
        inner: distance of neighbouring coordinates of one block, in blocks of coordinates.
        block: coordinates that stay together.
    """

    batches: int
    columns: int
    rows: int
    inner: int
    block: int

    @property
    def transposed(self) -> "Pass":
        """The pass that takes gradients of the output to gradients of the input."""
        return self._replace(columns=self.rows, rows=self.columns)


class Tile(NamedTuple):
    """What one program multiplies at once, and how it is launched.

    Attributes:
        batches: blocks.
        tokens: tokens.
        rows: rows of a block.
        columns: columns of a block.
        warps: warps of a program.
        stages: depth of the software pipeline.
        shared: most KiB of shared memory that it takes in any pass.
    """

    batches: int
    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    shared: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The constants TILE of ``kernels``."""
        return self[:4]


# one for each pass of a launch
Tiles = tuple[Tile, ...]
# the same for all dtypes: the sums are float32
_FEW = (Tile(1, 1, 16, 1024, 2, 1, 2), Tile(1, 1, 8, 512, 1, 1, 2), Tile(1, 1, 32, 2048, 4, 1, 4))
# (kernel, interleaved batches, bytes of a number) -> candidates before they are cut to a pass; the batches of contiguous
# passes are batches * columns, and the columns of the kernel for few tokens are rows * columns. Candidates of the fused
# kernel belong together in pairs and have the same number of tokens.
_CANDIDATES: dict[tuple[str, bool, int], Tiles] = {
    ("mix", False, 2): (Tile(64, 64, 64, 64, 8, 2, 32),),
    ("mix", True, 2): (
        Tile(0, 16, 32, 64, 8, 2, 112),
        Tile(0, 32, 16, 64, 8, 2, 104),
        Tile(0, 16, 16, 32, 4, 2, 36),
    ),
    ("mix", False, 4): (Tile(32, 32, 32, 32, 4, 1, 8), Tile(32, 16, 32, 32, 4, 1, 6)),
    ("mix", True, 4): (Tile(0, 16, 16, 16, 4, 1, 17), Tile(0, 16, 16, 16, 8, 1, 16)),
    ("fused", False, 2): (Tile(128, 32, 32, 64, 8, 2, 80), Tile(64, 16, 32, 64, 8, 2, 64), Tile(128, 32, 32, 64, 8, 1, 49)),
    ("fused", True, 2): (Tile(0, 32, 32, 32, 8, 2, 80), Tile(0, 16, 32, 32, 8, 2, 64), Tile(0, 32, 16, 32, 8, 1, 49)),
    ("gradient", False, 2): (
        Tile(128, 64, 64, 64, 8, 3, 64),
        Tile(64, 64, 64, 64, 4, 3, 32),
        Tile(128, 32, 64, 64, 8, 3, 32),
    ),
    ("gradient", True, 2): (Tile(0, 16, 32, 32, 8, 3, 64), Tile(0, 16, 16, 32, 4, 3, 40)),
    ("gradient", False, 4): (
        Tile(32, 32, 32, 32, 4, 3, 20),
        Tile(32, 16, 32, 32, 4, 3, 10),
        Tile(64, 32, 32, 32, 8, 3, 40),
    ),
    ("gradient", True, 4): (Tile(0, 16, 16, 16, 4, 3, 40), Tile(0, 16, 16, 16, 8, 2, 24)),
    **dict.fromkeys(product(["few"], [False, True], [2, 4]), _FEW),
}


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least the size."""
    return 1 << (size - 1).bit_length()


def _side(size: int, largest: int) -> int:
    return min(largest, max(SMALLEST_SIDE, power_of_two(size)))


def candidates(kernel: str, passes: Sequence[Pass], itemsize: int, shared_memory: int | None = None) -> list[Tiles]:
    """Tiles that may run the passes of a launch, one for each pass; the first is the one to run untimed.

    Args:
        kernel: ``mix``, ``fused``, ``few`` or ``gradient``.
        passes: the passes of the launch.
        itemsize: bytes of a number, 2 or 4.
        shared_memory: most bytes that a program may have on the device; None where there is none.

    Raises:
        BackendError: when no candidate fits into the shared memory.
    """
    together = zip(*(_CANDIDATES[kernel, p.inner > 1, itemsize] for p in passes), strict=True)
    # candidates that a small pass cuts to the same tile are one
    found = dict.fromkeys(tuple(map(partial(_cut, kernel, itemsize), passes, largest)) for largest in together)
    needed = [1024 * max(tile.shared for tile in option) for option in found]
    limit = max(needed) if shared_memory is None else shared_memory
    fitting = [option for option, size in zip(found, needed, strict=True) if size <= limit]
    if not fitting:
        raise BackendError(
            f"kernel {kernel} needs {min(needed)} bytes of shared memory, the device has {limit}; use merged or reference"
        )
    return fitting


def _cut(kernel: str, itemsize: int, p: Pass, largest: Tile) -> Tile:
    """The tile of a pass."""
    if kernel == "few":
        columns = power_of_two(p.columns)
        rows = max(1, min(largest.rows, largest.columns // columns, power_of_two(p.rows)))
        return largest._replace(rows=rows, columns=columns)
    columns = _side(p.columns, largest.columns)
    rows = _side(p.rows, largest.rows)
    batches = largest.batches // columns
    if p.inner > 1:
        # interleaved batches fill a sector together with the coordinates of a block that lie side by side
        batches = max(1, SECTOR_BYTES // itemsize // power_of_two(p.block))
        if kernel == "mix":
            # a tile much narrower than it is deep spills eight bytes on sm_90
            rows = min(largest.rows, max(rows, columns // 2))
    return largest._replace(batches=min(batches, power_of_two(p.batches)), rows=rows, columns=columns)


def merge_tile(middle: int) -> Tile:
    """Rows and columns that one program merges of a block, the rows all there are."""
    side = max(MERGED_COLUMNS, power_of_two(middle))
    return Tile(1, 1, side, MERGED_COLUMNS, max(1, side // 32), 1, 8)


def has_few_tokens(tokens: int, passes: list[Pass]) -> bool:
    """Whether the kernel for few tokens runs every pass."""
    return tokens <= FEW_TOKENS and all(p.columns <= FEW_TOKENS_COLUMNS for p in passes)


def fuses(pair: list[Pass], tokens: int, itemsize: int) -> bool:
    """Whether two passes run in one launch; for float32 no pair of tiles was found that never spills."""
    widest = max(p.batches * max(p.columns, p.rows) for p in pair)
    return len(pair) == 2 and itemsize == 2 and tokens >= FUSED_TOKENS and widest <= FUSED_WIDTH


def count(size: int, tile: int) -> int:
    """Number of tiles that cover a size."""
    return -(-size // tile)


def programs(tile: Tile, multiprocessors: int) -> int:
    """Number of programs that keep all multiprocessors busy."""
    return multiprocessors * max(1, WARPS // tile.warps)


def token_shares(tile: Tile, items: int, tokens: int, multiprocessors: int) -> int:
    """Number of programs that share the tokens of one tile of blocks, of which there are ``items``."""
    return max(1, min(count(tokens, tile.tokens), count(programs(tile, multiprocessors), items)))
