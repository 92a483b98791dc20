"""Triton kernel of the sum of grouped products.

A program owns a tile of one group's matrix, sums over the group's rows in fp32 and adds the tile to what is there: each
element is read and written once, by one program, and not at all where the group has no rows. Groups begin anywhere;
rows of a multiple of 8 elements keep loads of 16 bytes. Nothing here may be imported where Triton is missing. In
Triton's interpreter UPCAST must be set: the product then has fp32 operands (already rounded).
Shapes: T rows, E groups, M and N columns.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(base, first_row, end, first_column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load [ROWS, COLUMNS] from a row on; zero from `end` on and past the last column."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    # Rows times columns can pass 2**31. Strides are in vectors of 8 elements, so that loads are known to be aligned.
    pointers = base + row.to(tl.int64)[:, None] * (columns // 8 * 8) + column[None, :]
    return tl.load(pointers, mask=(row < end)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])
def add_products(
    total,
    gradient,
    rows,
    ends,
    columns_m,
    columns_n,
    tiles_m,
    tiles_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // (tiles_m * tiles_n)
    tile = program % (tiles_m * tiles_n)
    first_m = tile // tiles_n * BLOCK_M
    first_n = tile % tiles_n * BLOCK_N
    begin = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    if begin >= end:
        return
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        left = _tile(gradient, first, end, first_m, columns_m, BLOCK_T, BLOCK_M)
        right = _tile(rows, first, end, first_n, columns_n, BLOCK_T, BLOCK_N)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    matrix = total + group.to(tl.int64) * columns_m * columns_n
    pointers = matrix + row[:, None] * (columns_n // 8 * 8) + column[None, :]
    inside = (row < columns_m)[:, None] & (column < columns_n)[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + sums, mask=inside)
