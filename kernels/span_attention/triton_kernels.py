"""Triton kernels of span attention: forward, and for the backward pass delta, dq, and dk with dv.

A program owns a block of queries (forward, dq) or of keys (dk, dv) and visits the range of blocks of the other kind
that its row of a table names (`spans.py`): first those that it sees in part, which are masked, then the run that it
sees whole, which is not. Softmax and all sums are fp32; what enters a product is rounded to the inputs' dtype.

`columns` of a head dim are the power of two at or above it; those past the head dim are masked. Where accumulators of
all columns do not fit in registers (head dim 512) programs split them: each computes the scores over all columns and
keeps `OWN` columns of the result.

Strides count vectors of 8 elements (16 bytes of bf16), so that loads are known to be aligned whatever the head dim;
no argument is specialised on its value, so that the code compiled ahead of time in tests is the code that runs.

Nothing here may be imported where Triton is missing. In Triton's interpreter `UPCAST` must be set: products are then
of fp32 operands (already rounded).
Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

import triton
import triton.language as tl

_STRIDES = [f"{name}_{axis}" for name in "q k v out d dq dk dv".split() for axis in ("batch", "head", "token")]
_RUNTIME = [*_STRIDES, "heads", "group", "length", "num_blocks"]
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _head(base, batch, batch_stride, head, head_stride):
    return base + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * 8


@triton.jit
def _tile(
    base, start, token_stride, length, first_column, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] from token `start` of a head; zero past the head dim and, under TAIL, past the sequence."""
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    # Tokens times stride can pass 2**31.
    pointers = base + start.to(tl.int64) * token_stride * 8 + rows[:, None] * (token_stride * 8) + columns[None, :]
    IN_HEAD: tl.constexpr = HEAD_DIM % COLUMNS == 0
    if TAIL and IN_HEAD:
        return tl.load(pointers, mask=(start + rows < length)[:, None], other=0.0)
    elif TAIL:
        return tl.load(pointers, mask=(start + rows < length)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif IN_HEAD:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_tile(
    base, start, token_stride, length, first_column, values, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    pointers = base + start.to(tl.int64) * token_stride * 8 + rows[:, None] * (token_stride * 8) + columns[None, :]
    inside = (start + rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _ranges(table, index):
    """First block, first whole block, the block after the last whole one, and the block after the last."""
    row = table + index * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _partial(step, begin, whole_begin, whole_end):
    """Block of the step-th visit to blocks that are seen in part: they lie on both sides of the whole ones."""
    block = begin + step
    return tl.where(block >= whole_begin, block + (whole_end - whole_begin), block)


@triton.jit
def _attend(
    total, sums, peak, q_tile, k, v, key_start, first, last, k_token, v_token, length, own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running softmax; `scale` includes log2(e)."""
    k_tile = _tile(k, key_start, k_token, length, 0, HEAD_DIM, BLOCK_K, COLUMNS, MASKED)
    scores = _product(q_tile, tl.trans(k_tile), UPCAST) * scale
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A query that has seen nothing yet: -inf minus -inf is no number.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    v_tile = _tile(v, key_start, v_token, length, own_column, HEAD_DIM, BLOCK_K, OWN, MASKED)
    sums = sums * rescale + tl.sum(weights, 1)
    total = total * rescale[:, None] + _product(weights.to(v_tile.dtype), v_tile, UPCAST)
    return total, sums, new_peak


@triton.jit(do_not_specialize=_RUNTIME)
def forward(
    q, k, v, out, lse, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    heads, group, length, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, N * shares of the columns, B). `first`, `last` [B, S], `table` [B, blocks, 4] int32."""
    # Later queries see more keys under a causal mask: they start first, so that the short ones fill the end.
    block = num_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1) % heads
    own_column = (tl.program_id(1) // heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < length
    q = _head(q, batch, q_batch, head, q_head)
    k = _head(k, batch, k_batch, (head // group), k_head)
    v = _head(v, batch, v_batch, (head // group), v_head)
    out = _head(out, batch, out_batch, head, out_head)
    first_key = tl.load(first + batch.to(tl.int64) * length + rows, mask=real, other=2147483647)
    last_key = tl.load(last + batch.to(tl.int64) * length + rows, mask=real, other=-1)
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)

    q_tile = _tile(q, start, q_token, length, 0, HEAD_DIM, BLOCK_Q, COLUMNS, True)
    scale *= _LOG2_E
    total = tl.zeros([BLOCK_Q, OWN], dtype=tl.float32)
    sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    for step in range((end - begin) - (whole_end - whole_begin)):
        key_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_K
        total, sums, peak = _attend(
            total, sums, peak, q_tile, k, v, key_start, first_key, last_key, k_token, v_token, length, own_column,
            scale, HEAD_DIM, COLUMNS, OWN, BLOCK_K, True, UPCAST,
        )  # fmt: skip
    for step in range(whole_end - whole_begin):
        total, sums, peak = _attend(
            total, sums, peak, q_tile, k, v, (whole_begin + step) * BLOCK_K, first_key, last_key, k_token, v_token,
            length, own_column, scale, HEAD_DIM, COLUMNS, OWN, BLOCK_K, False, UPCAST,
        )  # fmt: skip
    # A query that sees nothing: zero, and -inf as the logarithm of an empty sum.
    sums = tl.where(sums == 0.0, 1.0, sums)
    total = total / sums[:, None]
    _store_tile(out, start, out_token, length, own_column, total, HEAD_DIM, BLOCK_Q, OWN)
    if own_column == 0:
        statistics = (batch * heads + head).to(tl.int64) * length
        tl.store(lse + statistics + rows, (peak + tl.log2(sums)) / _LOG2_E, mask=real)


@triton.jit(do_not_specialize=_RUNTIME)
def delta_of(
    out, d_out, delta, out_batch, out_head, out_token, d_batch, d_head, d_token, heads, length,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [B, N, S] = sum(out * d_out) over D. Grid (blocks of queries, N, B)."""
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2)
    out = _head(out, batch, out_batch, head, out_head)
    d_out = _head(d_out, batch, d_batch, head, d_head)
    a = _tile(out, start, out_token, length, 0, HEAD_DIM, BLOCK, COLUMNS, True).to(tl.float32)
    b = _tile(d_out, start, d_token, length, 0, HEAD_DIM, BLOCK, COLUMNS, True).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    statistics = (batch * heads + head).to(tl.int64) * length
    tl.store(delta + statistics + rows, tl.sum(a * b, 1), mask=rows < length)


@triton.jit
def _add_dq(
    dq, q_tile, d_tile, k, v, key_start, first, last, lse, delta, k_token, v_token, length, own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys' share of dq, without the factor `scale`; `lse` is to base 2 and `scale` includes log2(e)."""
    k_tile = _tile(k, key_start, k_token, length, 0, HEAD_DIM, BLOCK_K, COLUMNS, MASKED)
    weights = tl.exp2(_product(q_tile, tl.trans(k_tile), UPCAST) * scale - lse[:, None])
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        weights = tl.where(visible, weights, 0.0)
    v_tile = _tile(v, key_start, v_token, length, 0, HEAD_DIM, BLOCK_K, COLUMNS, MASKED)
    d_weights = _product(d_tile, tl.trans(v_tile), UPCAST)
    d_scores = (weights * (d_weights - delta[:, None])).to(k_tile.dtype)
    if OWN == COLUMNS:
        own_tile = k_tile
    else:
        own_tile = _tile(k, key_start, k_token, length, own_column, HEAD_DIM, BLOCK_K, OWN, MASKED)
    return dq + _product(d_scores, own_tile, UPCAST)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_queries(
    q, k, v, d_out, lse, delta, dq, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, d_batch, d_head, d_token,
    dq_batch, dq_head, dq_token,
    heads, group, length, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq. Grid and table as in `forward`."""
    block = num_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1) % heads
    own_column = (tl.program_id(1) // heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < length
    q = _head(q, batch, q_batch, head, q_head)
    k = _head(k, batch, k_batch, (head // group), k_head)
    v = _head(v, batch, v_batch, (head // group), v_head)
    d_out = _head(d_out, batch, d_batch, head, d_head)
    dq = _head(dq, batch, dq_batch, head, dq_head)
    first_key = tl.load(first + batch.to(tl.int64) * length + rows, mask=real, other=2147483647)
    last_key = tl.load(last + batch.to(tl.int64) * length + rows, mask=real, other=-1)
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)
    statistics = (batch * heads + head).to(tl.int64) * length
    lse_rows = tl.load(lse + statistics + rows, mask=real, other=float("inf")) * _LOG2_E
    delta_rows = tl.load(delta + statistics + rows, mask=real, other=0.0)

    q_tile = _tile(q, start, q_token, length, 0, HEAD_DIM, BLOCK_Q, COLUMNS, True)
    d_tile = _tile(d_out, start, d_token, length, 0, HEAD_DIM, BLOCK_Q, COLUMNS, True)
    total = tl.zeros([BLOCK_Q, OWN], dtype=tl.float32)
    scale_2 = scale * _LOG2_E
    for step in range((end - begin) - (whole_end - whole_begin)):
        key_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_K
        total = _add_dq(
            total, q_tile, d_tile, k, v, key_start, first_key, last_key, lse_rows, delta_rows, k_token, v_token,
            length, own_column, scale_2, HEAD_DIM, COLUMNS, OWN, BLOCK_K, True, UPCAST,
        )  # fmt: skip
    for step in range(whole_end - whole_begin):
        total = _add_dq(
            total, q_tile, d_tile, k, v, (whole_begin + step) * BLOCK_K, first_key, last_key, lse_rows, delta_rows,
            k_token, v_token, length, own_column, scale_2, HEAD_DIM, COLUMNS, OWN, BLOCK_K, False, UPCAST,
        )  # fmt: skip
    _store_tile(dq, start, dq_token, length, own_column, total * scale, HEAD_DIM, BLOCK_Q, OWN)


@triton.jit
def _add_dk_dv(
    dk, dv, k_tile, v_tile, q, d_out, lse, delta, first, last, query_start, key_start, q_token, d_token, length,
    own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries' share of dk, without the factor `scale`, and of dv. Scores are held as [keys, queries]."""
    rows = query_start + tl.arange(0, BLOCK_Q)
    real = rows < length
    q_tile = _tile(q, query_start, q_token, length, 0, HEAD_DIM, BLOCK_Q, COLUMNS, True)
    # exp2 of minus infinity: rows past the end have no weight, in blocks that are seen whole too.
    lse_rows = tl.load(lse + rows, mask=real, other=float("inf")) * _LOG2_E
    weights = tl.exp2(_product(k_tile, tl.trans(q_tile), UPCAST) * scale - lse_rows[None, :])
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        first_key = tl.load(first + rows, mask=real, other=2147483647)
        last_key = tl.load(last + rows, mask=real, other=-1)
        visible = (keys[:, None] >= first_key[None, :]) & (keys[:, None] <= last_key[None, :])
        weights = tl.where(visible, weights, 0.0)
    d_tile = _tile(d_out, query_start, d_token, length, 0, HEAD_DIM, BLOCK_Q, COLUMNS, True)
    if OWN == COLUMNS:
        own_q, own_d = q_tile, d_tile
    else:
        own_q = _tile(q, query_start, q_token, length, own_column, HEAD_DIM, BLOCK_Q, OWN, True)
        own_d = _tile(d_out, query_start, d_token, length, own_column, HEAD_DIM, BLOCK_Q, OWN, True)
    dv += _product(weights.to(d_tile.dtype), own_d, UPCAST)
    d_weights = _product(v_tile, tl.trans(d_tile), UPCAST)
    delta_rows = tl.load(delta + rows, mask=real, other=0.0)
    d_scores = weights * (d_weights - delta_rows[None, :])
    dk += _product(d_scores.to(q_tile.dtype), own_q, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=_RUNTIME)
def backward_keys(
    q, k, v, d_out, lse, delta, dk, dv, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, d_batch, d_head, d_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    heads, group, length, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the query heads of a group. Grid (blocks of keys, G * shares of the columns, B).

    `table` [B, blocks of keys, 4] names ranges of blocks of queries.
    """
    block = tl.program_id(0)
    key_heads = heads // group
    key_head = tl.program_id(1) % key_heads
    own_column = (tl.program_id(1) // key_heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_K
    k = _head(k, batch, k_batch, key_head, k_head)
    v = _head(v, batch, v_batch, key_head, v_head)
    dk = _head(dk, batch, dk_batch, key_head, dk_head)
    dv = _head(dv, batch, dv_batch, key_head, dv_head)
    first += batch.to(tl.int64) * length
    last += batch.to(tl.int64) * length
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)

    k_tile = _tile(k, start, k_token, length, 0, HEAD_DIM, BLOCK_K, COLUMNS, True)
    v_tile = _tile(v, start, v_token, length, 0, HEAD_DIM, BLOCK_K, COLUMNS, True)
    dk_total = tl.zeros([BLOCK_K, OWN], dtype=tl.float32)
    dv_total = tl.zeros([BLOCK_K, OWN], dtype=tl.float32)
    scale_2 = scale * _LOG2_E
    for member in range(group):
        head = key_head * group + member
        q_here = _head(q, batch, q_batch, head, q_head)
        d_here = _head(d_out, batch, d_batch, head, d_head)
        statistics = (batch * heads + head).to(tl.int64) * length
        for step in range((end - begin) - (whole_end - whole_begin)):
            query_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_Q
            dk_total, dv_total = _add_dk_dv(
                dk_total, dv_total, k_tile, v_tile, q_here, d_here, lse + statistics, delta + statistics, first, last,
                query_start, start, q_token, d_token, length, own_column, scale_2,
                HEAD_DIM, COLUMNS, OWN, BLOCK_Q, BLOCK_K, True, UPCAST,
            )  # fmt: skip
        for step in range(whole_end - whole_begin):
            dk_total, dv_total = _add_dk_dv(
                dk_total, dv_total, k_tile, v_tile, q_here, d_here, lse + statistics, delta + statistics, first, last,
                (whole_begin + step) * BLOCK_Q, start, q_token, d_token, length, own_column, scale_2,
                HEAD_DIM, COLUMNS, OWN, BLOCK_Q, BLOCK_K, False, UPCAST,
            )  # fmt: skip
    _store_tile(dk, start, dk_token, length, own_column, dk_total * scale, HEAD_DIM, BLOCK_K, OWN)
    _store_tile(dv, start, dv_token, length, own_column, dv_total, HEAD_DIM, BLOCK_K, OWN)
