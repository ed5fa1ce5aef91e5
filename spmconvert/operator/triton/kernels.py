"""The Triton kernels that send tokens through merged blocks; nothing but device code.

Every group of stages is one *pass*: coordinate i is ((outer * middle + m) * inner + j) * block + c, batch number
outer * inner + j owns one block, and the block mixes index m * block + c. ``_coordinate`` writes that down once, so the
transposes of the merged form are strided loads and stores here, never copies. A transposed pass (for the gradient of the
input) is the same kernel reading the blocks with their strides exchanged.

A tile is [batches, tokens, columns] times [batches, columns, rows]: three-dimensional products, because a pass with
``inner > 1`` reads runs of neighbouring batches to fill memory sectors. Such products compile to ``mma.sync`` on every
architecture, also where two-dimensional ones would use ``wgmma``; what limits these kernels is memory, not the matrix
unit. Sizes that are no powers of two are padded by masks.

``fused_kernel`` runs two passes for the same tokens in one launch. The rows between them go through a buffer that only
this program touches: the activations that training keeps, or a scratch slot of the program that stays in the cache.
Triton has no addressable shared memory, and a tile of rows that is cut twice in different directions cannot stay in
registers while the blocks stream through.

Names shared by the kernels that see tokens: PASS is (batches, columns, rows, inner, block), TILE is (batches, tokens, rows,
columns) of a tile, powers of two; SOURCE and TARGET are the features of what is read and written, PRECISION is ``tl.dot``'s
for float32. The number of tokens is not specialised on, so that a new length never compiles anything. UPCAST exists for
Triton's interpreter, which computes bfloat16 wrongly: numbers become float32 right after the load.

``merge_kernel`` and ``merge_gradient_kernel`` turn stages into blocks and gradients of blocks into gradients of stages.
In PyTorch that is some 250 launches a layer and step at width 1024, here one a group each way. A program owns columns of a
block, in registers; a stage exchanges rows by the exclusive or of bits, as ``tl.sort`` does, which is exact. The backward
runs the stages again from the start for every stage: k²/2 exchanges in registers instead of k blocks in memory.

This module imports Triton when it is imported; ``launches`` does that at the first launch.
"""

import triton
import triton.language as tl


@triton.jit
def _coordinate(batch, index, SIZE: tl.constexpr, PASS: tl.constexpr):
    """Place of a block's row or column among a token's features; SIZE is how many of them the block has."""
    INNER: tl.constexpr = PASS[3]
    BLOCK: tl.constexpr = PASS[4]
    middle: tl.constexpr = SIZE // BLOCK
    return ((batch // INNER * middle + index // BLOCK) * INNER + batch % INNER) * BLOCK + index % BLOCK


@triton.jit
def _load_tokens(
    x, stride, left, batch, index, SIZE: tl.constexpr, PASS: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Read [batch, token, index] from the rows that begin at x, ``left`` of them; FEATURES repeat if they are too few."""
    BATCHES: tl.constexpr = PASS[0]
    token, b, i = tl.arange(0, TOKENS)[None, :, None], batch[:, None, None], index[None, None, :]
    place = _coordinate(b, i, SIZE, PASS)
    if FEATURES < BATCHES * SIZE:
        place = place % FEATURES
    values = tl.load(x + token * stride + place, mask=(token < left) & (b < BATCHES) & (i < SIZE), other=0.0)
    return values.to(tl.float32) if UPCAST else values


@triton.jit
def _load_blocks(
    w, batch, column, row, PASS: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Read blocks as [batch, column, row]; in memory they are [batch, row, column], the reverse if transposed."""
    COLUMNS: tl.constexpr = PASS[1]
    ROWS: tl.constexpr = PASS[2]
    b, c, r = batch[:, None, None], column[None, :, None], row[None, None, :]
    place = c * ROWS + r if TRANSPOSED else r * COLUMNS + c
    values = tl.load(w + b * (ROWS * COLUMNS) + place, mask=(b < PASS[0]) & (c < COLUMNS) & (r < ROWS), other=0.0)
    return values.to(tl.float32) if UPCAST else values


@triton.jit
def _store_tokens(
    sums, y, stride, tail, tail_stride, bias, left, batch, row, PASS: tl.constexpr, FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write [batch, token, row] plus the bias, if there is one; coordinates past the features go to the tail."""
    BATCHES: tl.constexpr = PASS[0]
    ROWS: tl.constexpr = PASS[2]
    token, b, r = tl.arange(0, TOKENS)[None, :, None], batch[:, None, None], row[None, None, :]
    place = _coordinate(b, r, ROWS, PASS)
    kept = (b < BATCHES) & (r < ROWS) & (place < FEATURES)
    if bias is not None:
        sums += tl.load(bias + place, mask=kept, other=0.0).to(tl.float32)
    rounded = sums.to(y.dtype.element_ty)
    tl.store(y + token * stride + place, rounded, mask=kept & (token < left))
    if FEATURES < BATCHES * ROWS:
        past = (b < BATCHES) & (r < ROWS) & (place >= FEATURES)
        tl.store(tail + token * tail_stride + place - FEATURES, rounded, mask=past & (token < left))


@triton.jit
def _product(
    x, stride, w, left, batch, row, PASS: tl.constexpr, TILE: tl.constexpr, SOURCE: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of a pass, float32 [batch, token, row], summed over all columns."""
    COLUMNS: tl.constexpr = PASS[1]
    sums = tl.full((TILE[0], TILE[1], TILE[2]), 0.0, tl.float32)
    for first in range(0, COLUMNS, TILE[3]):
        column = first + tl.arange(0, TILE[3])
        rows_of_x = _load_tokens(x, stride, left, batch, column, COLUMNS, PASS, SOURCE, TILE[1], UPCAST)
        blocks = _load_blocks(w, batch, column, row, PASS, TRANSPOSED, UPCAST)
        sums = tl.dot(rows_of_x, blocks, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    x, w, bias, y, tail, tokens, x_stride, y_stride, tail_stride,
    PASS: tl.constexpr, TILE: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One pass; program (i, s) owns tile i of batches and rows and takes every num_programs(1)-th tile of tokens from s.

    x [tokens, SOURCE], w [batches, rows, columns], bias [TARGET] or None, y [tokens, TARGET], tail [tokens, coordinates
    past TARGET]. Blocks that fit in one tile are read once and kept for all tokens of the program.
    """
    COLUMNS: tl.constexpr = PASS[1]
    ROWS: tl.constexpr = PASS[2]
    row_tiles: tl.constexpr = (ROWS + TILE[2] - 1) // TILE[2]
    batch = tl.program_id(0) // row_tiles * TILE[0] + tl.arange(0, TILE[0])
    row = tl.program_id(0) % row_tiles * TILE[2] + tl.arange(0, TILE[2])
    column = tl.arange(0, TILE[3])
    if COLUMNS <= TILE[3]:
        blocks = _load_blocks(w, batch, column, row, PASS, TRANSPOSED, UPCAST)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, TILE[1]), tl.num_programs(1)):
        first = tl.full((), TILE[1], tl.int64) * tile
        left = tokens - tile * TILE[1]
        source = x + first * x_stride
        if COLUMNS <= TILE[3]:
            rows_of_x = _load_tokens(source, x_stride, left, batch, column, COLUMNS, PASS, SOURCE, TILE[1], UPCAST)
            sums = tl.dot(rows_of_x, blocks, input_precision=PRECISION)
        else:
            sums = _product(
                source, x_stride, w, left, batch, row, PASS, TILE, SOURCE, TRANSPOSED, PRECISION, UPCAST
            )  # fmt: skip
        _store_tokens(
            sums, y + first * y_stride, y_stride, tail + first * tail_stride, tail_stride, bias, left, batch, row,
            PASS, TARGET, TILE[1],
        )  # fmt: skip


@triton.jit
def _mix_rows(
    x, x_stride, w, bias, y, y_stride, tail, tail_stride, left,
    PASS: tl.constexpr, TILE: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One whole pass over one tile of tokens."""
    batch_tiles: tl.constexpr = (PASS[0] + TILE[0] - 1) // TILE[0]
    row_tiles: tl.constexpr = (PASS[2] + TILE[2] - 1) // TILE[2]
    for item in range(batch_tiles * row_tiles):
        batch = item // row_tiles * TILE[0] + tl.arange(0, TILE[0])
        row = item % row_tiles * TILE[2] + tl.arange(0, TILE[2])
        sums = _product(x, x_stride, w, left, batch, row, PASS, TILE, SOURCE, TRANSPOSED, PRECISION, UPCAST)
        _store_tokens(sums, y, y_stride, tail, tail_stride, bias, left, batch, row, PASS, TARGET, TILE[1])


@triton.jit(do_not_specialize=["tokens"])
def fused_kernel(
    x, w, next_w, hidden, bias, y, tail, tokens, x_stride, y_stride, tail_stride,
    PASS: tl.constexpr, NEXT_PASS: tl.constexpr, TILE: tl.constexpr, NEXT_TILE: tl.constexpr, SOURCE: tl.constexpr,
    HIDDEN: tl.constexpr, KEEP: tl.constexpr, TARGET: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Two passes; program s takes every num_programs(0)-th tile of tokens, beginning at s.

    As ``mix_kernel``, with hidden [tokens, HIDDEN] if KEEP, else [programs * tokens of a tile, HIDDEN]. Both tiles have
    the same number of tokens. The barriers order this program's own writes and reads of hidden, nobody else sees them.
    """
    for tile in range(tl.program_id(0), tl.cdiv(tokens, TILE[1]), tl.num_programs(0)):
        first = tl.full((), TILE[1], tl.int64) * tile
        left = tokens - tile * TILE[1]
        own = first if KEEP else tl.program_id(0).to(tl.int64) * TILE[1]
        between = hidden + own * HIDDEN
        _mix_rows(
            x + first * x_stride, x_stride, w, None, between, HIDDEN, between, HIDDEN, left,
            PASS, TILE, SOURCE, HIDDEN, TRANSPOSED, PRECISION, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()
        _mix_rows(
            between, HIDDEN, next_w, bias, y + first * y_stride, y_stride, tail + first * tail_stride, tail_stride, left,
            NEXT_PASS, NEXT_TILE, HIDDEN, TARGET, TRANSPOSED, PRECISION, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def few_tokens_kernel(
    x, w, bias, y, tail, x_stride, y_stride, tail_stride,
    PASS: tl.constexpr, TILE: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One pass for so few tokens that reading the blocks is the work: no padding to a matrix unit's tile, sums in float32.

    Program (i, token) owns tile i of batches and rows. Arguments as ``mix_kernel``; TILE[3] covers all columns, TILE[1]
    is 1. Blocks are read along their rows in memory.
    """
    COLUMNS: tl.constexpr = PASS[1]
    ROWS: tl.constexpr = PASS[2]
    row_tiles: tl.constexpr = (ROWS + TILE[2] - 1) // TILE[2]
    batch = tl.program_id(0) // row_tiles * TILE[0] + tl.arange(0, TILE[0])
    row = tl.program_id(0) % row_tiles * TILE[2] + tl.arange(0, TILE[2])
    column = tl.arange(0, TILE[3])
    b, r, c = batch[:, None, None], row[None, :, None], column[None, None, :]
    inside = (b < PASS[0]) & (r < ROWS) & (c < COLUMNS)
    blocks = tl.load(w + (b * ROWS + r) * COLUMNS + c, mask=inside, other=0.0).to(tl.float32)
    token = tl.program_id(1).to(tl.int64)
    values = _load_tokens(x + token * x_stride, x_stride, 1, batch, column, COLUMNS, PASS, SOURCE, TILE[1], True)
    sums = tl.sum(blocks * values, axis=2)[:, None, :]
    _store_tokens(
        sums, y + token * y_stride, y_stride, tail + token * tail_stride, tail_stride, bias, 1, batch, row,
        PASS, TARGET, TILE[1],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def block_gradient_kernel(
    grad, x, parts, tokens, grad_stride, x_stride,
    PASS: tl.constexpr, TILE: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums over tokens of output gradient times input; program (i, s) owns one tile of blocks and one share of the tokens.

    grad [tokens, TARGET], x [tokens, SOURCE] -> parts [shares, batches, rows, columns], float32. Every share writes its
    own part, so the sum over shares is the same in every run.
    """
    BATCHES: tl.constexpr = PASS[0]
    COLUMNS: tl.constexpr = PASS[1]
    ROWS: tl.constexpr = PASS[2]
    column_tiles: tl.constexpr = (COLUMNS + TILE[3] - 1) // TILE[3]
    row_tiles: tl.constexpr = (ROWS + TILE[2] - 1) // TILE[2]
    item = tl.program_id(0)
    batch = item // (row_tiles * column_tiles) * TILE[0] + tl.arange(0, TILE[0])
    row = item // column_tiles % row_tiles * TILE[2] + tl.arange(0, TILE[2])
    column = item % column_tiles * TILE[3] + tl.arange(0, TILE[3])
    sums = tl.full((TILE[0], TILE[2], TILE[3]), 0.0, tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, TILE[1]), tl.num_programs(1)):
        first = tl.full((), TILE[1], tl.int64) * tile
        left = tokens - tile * TILE[1]
        g = _load_tokens(grad + first * grad_stride, grad_stride, left, batch, row, ROWS, PASS, TARGET, TILE[1], UPCAST)
        values = _load_tokens(x + first * x_stride, x_stride, left, batch, column, COLUMNS, PASS, SOURCE, TILE[1], UPCAST)
        sums = tl.dot(tl.permute(g, (0, 2, 1)), values, sums, input_precision=PRECISION)
    b, r, c = batch[:, None, None], row[None, :, None], column[None, None, :]
    place = (tl.program_id(1).to(tl.int64) * BATCHES + b) * (ROWS * COLUMNS) + r * COLUMNS + c
    tl.store(parts + place, sums, mask=(b < BATCHES) & (r < ROWS) & (c < COLUMNS))


@triton.jit
def _coefficients(
    weight, stage, batch, SIDE: tl.constexpr, STRIDE: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Both numbers of every row of a block in one stage, [SIDE, 1] each; a row without a partner has no second one."""
    row = tl.arange(0, SIDE)[:, None]
    place = (batch // INNER * MIDDLE + row) * INNER + batch % INNER + stage * (2 * WIDTH)
    own = tl.load(weight + place, mask=row < MIDDLE, other=0.0)
    other = tl.load(weight + WIDTH + place, mask=(row < MIDDLE) & ((row ^ STRIDE) < MIDDLE), other=0.0)
    return own, other


@triton.jit
def _partner_rows(x, SIDE: tl.constexpr, TILE: tl.constexpr, STRIDE: tl.constexpr):
    """Row r of x [SIDE, TILE] takes row r ^ STRIDE."""
    bits = x.to(tl.int32, bitcast=True).reshape(SIDE // (2 * STRIDE), 2, STRIDE, TILE)
    return (bits ^ tl.xor_sum(bits, axis=1, keep_dims=True)).reshape(SIDE, TILE).to(tl.float32, bitcast=True)


@triton.jit
def _run_stages(
    weight, scale_in, batch, column, FIRST: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr,
    MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns [1, TILE] of the product of COUNT stages and, where there is one, the input diagonal: [SIDE, TILE]."""
    row = tl.arange(0, SIDE)[:, None]
    x = tl.where((row == column) & (row < MIDDLE), 1.0, 0.0)
    if scale_in is not None:
        place = (batch // INNER * MIDDLE + column) * INNER + batch % INNER
        x *= tl.load(scale_in + place, mask=column < MIDDLE, other=0.0)
    for k in tl.static_range(COUNT):
        own, other = _coefficients(weight, FIRST + k, batch, SIDE, 1 << k, MIDDLE, INNER, WIDTH)
        x = own * x + other * _partner_rows(x, SIDE, TILE, 1 << k)
    return x


@triton.jit
def merge_kernel(
    weight, scale_in, scale_out, blocks, FIRST: tl.constexpr, STAGES: tl.constexpr, SIDE: tl.constexpr,
    TILE: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge a group of stages; program (batch, i) owns the i-th TILE columns of a block.

    weight [all stages, 2, WIDTH], scale_in and scale_out [WIDTH] or None -> blocks [batches, MIDDLE, MIDDLE], float32.
    The group begins at stage FIRST; its k-th stage pairs rows at distance 2**k. SIDE is MIDDLE's next power of two.
    """
    batch = tl.program_id(0)
    row, column = tl.arange(0, SIDE)[:, None], tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    x = _run_stages(weight, scale_in, batch, column, FIRST, STAGES, SIDE, TILE, MIDDLE, INNER, WIDTH)
    if scale_out is not None:
        place = (batch // INNER * MIDDLE + row) * INNER + batch % INNER
        x *= tl.load(scale_out + place, mask=row < MIDDLE, other=0.0)
    tl.store(blocks + (batch * MIDDLE + row) * MIDDLE + column, x, mask=(row < MIDDLE) & (column < MIDDLE))


@triton.jit
def _stage_gradient(
    g, weight, scale_in, grad_weight, batch, column, FIRST: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
    TILE: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the group's K-th stage; takes the gradient of its output and returns that of its input."""
    row = tl.arange(0, SIDE)[:, None]
    before = _run_stages(weight, scale_in, batch, column, FIRST, K, SIDE, TILE, MIDDLE, INNER, WIDTH)
    own, other = _coefficients(weight, FIRST + K, batch, SIDE, 1 << K, MIDDLE, INNER, WIDTH)
    target = grad_weight + (FIRST + K) * (2 * WIDTH) + (batch // INNER * MIDDLE + row) * INNER + batch % INNER
    tl.store(target, tl.sum(g * before, axis=1)[:, None], mask=row < MIDDLE)
    paired = tl.sum(g * _partner_rows(before, SIDE, TILE, 1 << K), axis=1)[:, None]
    tl.store(target + WIDTH, tl.where((row ^ (1 << K)) < MIDDLE, paired, 0.0), mask=row < MIDDLE)
    return own * g + _partner_rows(other * g, SIDE, TILE, 1 << K)


@triton.jit
def merge_gradient_kernel(
    grad, weight, scale_in, scale_out, grad_weight, grad_in, grad_out, all_stages, FIRST: tl.constexpr,
    STAGES: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of everything that ``merge_kernel`` reads, in parts that are to be added.

    grad [batches, MIDDLE, MIDDLE] -> grad_weight [tiles, all stages, 2, WIDTH] in the group's stages, grad_in and
    grad_out [tiles, WIDTH]: the part of a tile of columns in every block.
    """
    batch = tl.program_id(0)
    row, column = tl.arange(0, SIDE)[:, None], tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    place = (batch // INNER * MIDDLE + row) * INNER + batch % INNER
    grad_weight += tl.program_id(1) * all_stages * (2 * WIDTH)
    part = tl.program_id(1) * WIDTH + place
    inside = (row < MIDDLE) & (column < MIDDLE)
    g = tl.load(grad + (batch * MIDDLE + row) * MIDDLE + column, mask=inside, other=0.0)
    if scale_out is not None:
        merged = _run_stages(weight, scale_in, batch, column, FIRST, STAGES, SIDE, TILE, MIDDLE, INNER, WIDTH)
        tl.store(grad_out + part, tl.sum(g * merged, axis=1)[:, None], mask=row < MIDDLE)
        g *= tl.load(scale_out + place, mask=row < MIDDLE, other=0.0)
    for back in tl.static_range(STAGES):
        g = _stage_gradient(
            g, weight, scale_in, grad_weight, batch, column, FIRST, STAGES - 1 - back, SIDE, TILE, MIDDLE, INNER, WIDTH
        )  # fmt: skip
    if scale_in is not None:
        tl.store(grad_in + part, tl.sum(tl.where(row == column, g, 0.0), axis=1)[:, None], mask=row < MIDDLE)
