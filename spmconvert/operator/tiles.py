"""Sizes of the Triton kernels' tiles, chosen by shape from one small table; integers only.

A tile is rounded up to powers of two and to what a matrix unit multiplies. Two things decide: a pass whose batches
interleave in memory (``inner > 1``) takes as many neighbouring batches as fill a sector of 32 bytes, a contiguous one
takes few batches and more tokens; and float32 is multiplied on the ordinary units, where large tiles only cost registers.

The sizes are the largest that compile without spills and within the shared memory of both architectures that are
checked (sm_80 and sm_90); ``tests/operator/test_kernels_compile.py`` proves that for every entry. Nothing here has been
timed: no entry claims to be the fastest, and measured values belong here and nowhere else.
"""

from typing import NamedTuple

# up to this many tokens the time goes into reading the blocks, and every token has a program of its own
FEW_TOKENS = 16
# columns of a block that the kernel for few tokens holds at once
FEW_TOKENS_COLUMNS = 1024
# widest row of which a tile of tokens fits in the shared memory or the first-level cache of one multiprocessor
FUSED_WIDTH = 2048
# a fused launch has one program for each tile of tokens; with fewer tokens it would leave most multiprocessors idle
FUSED_TOKENS = 2048
# programs for each multiprocessor that the tokens are shared out to
PROGRAMS = 2
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
    """What one program multiplies at once, and how it is launched."""

    batches: int
    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The constants TILE of ``kernels``."""
        return self[:4]


# largest tiles: (kernel, interleaved batches, bytes of a number) -> batches * columns, tokens, rows, columns, warps, stages
_LARGEST = {
    ("mix", False, 2): Tile(64, 64, 64, 64, 8, 2),
    ("mix", True, 2): Tile(1024, 16, 32, 64, 8, 2),
    ("mix", False, 4): Tile(32, 32, 32, 32, 4, 1),
    ("mix", True, 4): Tile(128, 16, 16, 16, 4, 1),
    ("fused", False, 2): Tile(128, 32, 32, 64, 8, 2),
    ("fused", True, 2): Tile(512, 32, 32, 32, 8, 2),
    ("gradient", False, 2): Tile(128, 64, 64, 64, 8, 3),
    ("gradient", True, 2): Tile(512, 16, 32, 32, 8, 3),
    ("gradient", False, 4): Tile(32, 32, 32, 32, 4, 3),
    ("gradient", True, 4): Tile(128, 16, 16, 16, 4, 3),
}


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least the size."""
    return 1 << (size - 1).bit_length()


def _side(size: int, largest: int) -> int:
    return min(largest, max(SMALLEST_SIDE, power_of_two(size)))


def choose_tile(kernel: str, p: Pass, itemsize: int) -> Tile:
    """Tile of a pass.

    Args:
        kernel: ``mix``, ``fused`` or ``gradient``.
        p: the pass.
        itemsize: bytes of a number, 2 or 4.
    """
    interleaved = p.inner > 1
    largest = _LARGEST[kernel, interleaved, itemsize]
    columns = _side(p.columns, largest.columns)
    # interleaved batches fill a sector together with the coordinates of a block that lie side by side
    sector = max(1, SECTOR_BYTES // itemsize // power_of_two(p.block))
    batches = sector if interleaved else largest.batches // columns
    rows = _side(p.rows, largest.rows)
    if kernel == "mix" and interleaved:
        # a tile much narrower than it is deep spills eight bytes on sm_90
        rows = max(rows, columns // 2)
    return largest._replace(batches=min(batches, power_of_two(p.batches)), rows=rows, columns=columns)


def few_tokens_tile(p: Pass) -> Tile:
    """Tile of the kernel that gives every token its own programs."""
    columns = power_of_two(p.columns)
    return Tile(1, 1, max(1, min(16, FEW_TOKENS_COLUMNS // columns, power_of_two(p.rows))), columns, 2, 1)


def merge_tile(middle: int) -> Tile:
    """Rows and columns that one program merges of a block, the rows all there are."""
    side = max(MERGED_COLUMNS, power_of_two(middle))
    return Tile(1, 1, side, MERGED_COLUMNS, max(1, side // 32), 1)


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


def token_shares(items: int, token_tiles: int, multiprocessors: int) -> int:
    """Number of programs that share the tokens of one tile of blocks, so that all multiprocessors have work."""
    return max(1, min(token_tiles, count(PROGRAMS * multiprocessors, items)))
