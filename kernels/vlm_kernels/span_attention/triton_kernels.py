"""Triton kernels of span attention: forward, and for the backward pass delta, dq, and dk with dv.

A program owns a block of queries (forward, dq) or of keys (dk, dv) and visits the range of blocks of the other kind
that its row of a table gives (`spans.py`): first the partial blocks, which are masked, then the run of full blocks,
which are not. Softmax and all accumulators are fp32; operands of matmuls are rounded to the inputs' dtype.

COLUMNS is the smallest power of two that is at least the head dim; columns past the head dim read as zero. A program
computes OWN columns of the result: where accumulators of all columns do not fit in registers (head dim 512), several
programs compute the same scores and split the columns. Matmuls over the head dim go in pieces of CHUNK columns. With
CHUNK below COLUMNS both operands are loaded again for every pair of blocks, through a pipeline of DEPTH stages: a first
operand that lives through the loop would be held in registers.

With TMA, tensors are descriptors made on the host (`launch.py`) and the copy engine loads and bounds-checks tiles.
Without TMA (before Hopper), they are pointers, and strides count vectors of 8 elements, so that 16-byte loads are known
to be aligned whatever the head dim. No argument is specialised on its value: the code that tests compile ahead of time
is the code that runs.

Nothing here may be imported where Triton is missing. In Triton's interpreter UPCAST must be set: matmuls then have
fp32 operands (already rounded).
Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

import triton
import triton.language as tl

_STRIDES = [f"{name}_{axis}" for name in "q k v out d dq dk dv".split() for axis in ("batch", "head", "token")]
_RUNTIME = [*_STRIDES, "heads", "group", "num_queries", "num_keys", "num_blocks"]
# Parts of longer tensors may begin anywhere; their elements are loaded one by one in any case.
_ANY_ALIGNMENT = ["first", "last", "table"]
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_KEY = tl.constexpr(2147483647)


@triton.jit
def _pointers(head_of, start, first_column, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of a head, and a mask of those inside the tensor."""
    base, batch, head, batch_stride, head_stride, token_stride, length = head_of
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    # Tokens times stride can pass 2**31.
    offset = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + start.to(tl.int64) * token_stride
    pointers = base + offset * 8 + rows[:, None] * (token_stride * 8) + columns[None, :]
    inside = (start + rows < length)[:, None]
    if HEAD_DIM % COLUMNS != 0:
        inside &= (columns < HEAD_DIM)[None, :]
    return pointers, inside


@triton.jit
def _load(
    head_of, start, first_column, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Load a tile [ROWS, COLUMNS] from token `start` of a head; zero past the sequence and the head dim."""
    if TMA:
        return head_of[0].load([head_of[1], head_of[2], start, first_column]).reshape(ROWS, COLUMNS)
    else:
        pointers, inside = _pointers(head_of, start, first_column, HEAD_DIM, ROWS, COLUMNS)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(
    head_of, start, first_column, values, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        values = values.to(head_of[0].dtype).reshape(1, 1, ROWS, COLUMNS)
        head_of[0].store([head_of[1], head_of[2], start, first_column], values)
    else:
        pointers, inside = _pointers(head_of, start, first_column, HEAD_DIM, ROWS, COLUMNS)
        tl.store(pointers, values.to(head_of[0].dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _product_in_chunks(
    a, a_start, b, b_start, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute a b^T over the head dim in chunks of columns, [A_ROWS, B_ROWS] fp32."""
    total = tl.zeros([A_ROWS, B_ROWS], dtype=tl.float32)
    for column in tl.range(0, COLUMNS, CHUNK, num_stages=DEPTH):
        a_tile = _load(a, a_start, column, HEAD_DIM, A_ROWS, CHUNK, TMA)
        b_tile = _load(b, b_start, column, HEAD_DIM, B_ROWS, CHUNK, TMA)
        total += _product(a_tile, tl.trans(b_tile), UPCAST)
    return total


@triton.jit
def _ranges(table, index):
    """Load the first block, the first full block, the block after the last full one, and the block after the last."""
    row = table + index * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _partial(step, begin, whole_begin, whole_end):
    """Return the index of the step-th partial block; partial blocks lie on both sides of the full ones."""
    block = begin + step
    return tl.where(block >= whole_begin, block + (whole_end - whole_begin), block)


@triton.jit
def _attend(
    total, sums, peak, q_tile, q, query_start, k, v, key_start, first, last, own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running softmax; `scale` includes log2(e)."""
    if CHUNK == COLUMNS:
        k_tile = _load(k, key_start, 0, HEAD_DIM, BLOCK_K, COLUMNS, TMA)
        scores = _product(q_tile, tl.trans(k_tile), UPCAST)
    else:
        scores = _product_in_chunks(
            q, query_start, k, key_start, HEAD_DIM, COLUMNS, CHUNK, DEPTH, BLOCK_Q, BLOCK_K, UPCAST, TMA
        )
    scores *= scale
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A query that has seen nothing yet: -inf minus -inf would be NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    v_tile = _load(v, key_start, own_column, HEAD_DIM, BLOCK_K, OWN, TMA)
    sums = sums * rescale + tl.sum(weights, 1)
    total = total * rescale[:, None] + _product(weights.to(v_tile.dtype), v_tile, UPCAST)
    return total, sums, new_peak


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def forward(
    q, k, v, out, lse, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    heads, group, num_queries, num_keys, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute out and lse. The grid is (blocks of queries, N * splits of the columns, B).

    `first` and `last` are [B, Sq] int32, `table` is [B, blocks of queries, 4] int32.
    """
    # Under a causal mask later queries see more keys: they start first, so that short programs fill the end.
    block = num_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1) % heads
    own_column = (tl.program_id(1) // heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < num_queries
    q_of = (q, batch, head, q_batch, q_head, q_token, num_queries)
    k_of = (k, batch, head // group, k_batch, k_head, k_token, num_keys)
    v_of = (v, batch, head // group, v_batch, v_head, v_token, num_keys)
    first_key = tl.load(first + batch.to(tl.int64) * num_queries + rows, mask=real, other=_NO_KEY)
    last_key = tl.load(last + batch.to(tl.int64) * num_queries + rows, mask=real, other=-1)
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)

    q_tile = 0
    if CHUNK == COLUMNS:
        q_tile = _load(q_of, start, 0, HEAD_DIM, BLOCK_Q, COLUMNS, TMA)
    scale *= _LOG2_E
    total = tl.zeros([BLOCK_Q, OWN], dtype=tl.float32)
    sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    for step in range((end - begin) - (whole_end - whole_begin)):
        key_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_K
        total, sums, peak = _attend(
            total, sums, peak, q_tile, q_of, start, k_of, v_of, key_start, first_key, last_key, own_column, scale,
            HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, True, UPCAST, TMA,
        )  # fmt: skip
    for step in range(whole_end - whole_begin):
        key_start = (whole_begin + step) * BLOCK_K
        total, sums, peak = _attend(
            total, sums, peak, q_tile, q_of, start, k_of, v_of, key_start, first_key, last_key, own_column, scale,
            HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, False, UPCAST, TMA,
        )  # fmt: skip
    # A query that sees nothing has output zero, and lse -inf as the logarithm of an empty sum.
    sums = tl.where(sums == 0.0, 1.0, sums)
    out_of = (out, batch, head, out_batch, out_head, out_token, num_queries)
    _store(out_of, start, own_column, total / sums[:, None], HEAD_DIM, BLOCK_Q, OWN, TMA)
    if own_column == 0:
        statistics = (batch * heads + head).to(tl.int64) * num_queries
        tl.store(lse + statistics + rows, (peak + tl.log2(sums)) / _LOG2_E, mask=real)


@triton.jit(do_not_specialize=_RUNTIME)
def delta_of(
    out, d_out, delta, out_batch, out_head, out_token, d_batch, d_head, d_token, heads, num_queries,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute delta [B, N, Sq] = sum(out * d_out) over D, without TMA. The grid is (blocks of queries, N, B)."""
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2)
    out_of = (out, batch, head, out_batch, out_head, out_token, num_queries)
    d_of = (d_out, batch, head, d_batch, d_head, d_token, num_queries)
    a = _load(out_of, start, 0, HEAD_DIM, BLOCK, COLUMNS, False).to(tl.float32)
    b = _load(d_of, start, 0, HEAD_DIM, BLOCK, COLUMNS, False).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    statistics = (batch * heads + head).to(tl.int64) * num_queries
    tl.store(delta + statistics + rows, tl.sum(a * b, 1), mask=rows < num_queries)


@triton.jit
def _add_dq(
    dq, q_tile, d_tile, q, d_out, query_start, k, k_own, v, key_start, first, last, lse, delta, own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one key block's part of dq, without the factor `scale`; `lse` is to base 2 and `scale` includes log2(e)."""
    if CHUNK == COLUMNS:
        k_tile = _load(k, key_start, 0, HEAD_DIM, BLOCK_K, COLUMNS, TMA)
        scores = _product(q_tile, tl.trans(k_tile), UPCAST)
    else:
        scores = _product_in_chunks(
            q, query_start, k, key_start, HEAD_DIM, COLUMNS, CHUNK, DEPTH, BLOCK_Q, BLOCK_K, UPCAST, TMA
        )
    weights = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        weights = tl.where(visible, weights, 0.0)
    if CHUNK == COLUMNS:
        v_tile = _load(v, key_start, 0, HEAD_DIM, BLOCK_K, COLUMNS, TMA)
        d_weights = _product(d_tile, tl.trans(v_tile), UPCAST)
    else:
        d_weights = _product_in_chunks(
            d_out, query_start, v, key_start, HEAD_DIM, COLUMNS, CHUNK, DEPTH, BLOCK_Q, BLOCK_K, UPCAST, TMA
        )
    if CHUNK == COLUMNS and OWN == COLUMNS:
        own_tile = k_tile
    else:
        own_tile = _load(k_own, key_start, own_column, HEAD_DIM, BLOCK_K, OWN, TMA)
    d_scores = weights * (d_weights - delta[:, None])
    return dq + _product(d_scores.to(own_tile.dtype), own_tile, UPCAST)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def backward_queries(
    q, k, k_own, v, d_out, lse, delta, dq, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, d_batch, d_head, d_token,
    dq_batch, dq_head, dq_token,
    heads, group, num_queries, num_keys, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute dq. Grid and table are as in `forward`; `k_own` is `k` in tiles of OWN columns."""
    block = num_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1) % heads
    own_column = (tl.program_id(1) // heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < num_queries
    q_of = (q, batch, head, q_batch, q_head, q_token, num_queries)
    d_of = (d_out, batch, head, d_batch, d_head, d_token, num_queries)
    k_of = (k, batch, head // group, k_batch, k_head, k_token, num_keys)
    k_own_of = (k_own, batch, head // group, k_batch, k_head, k_token, num_keys)
    v_of = (v, batch, head // group, v_batch, v_head, v_token, num_keys)
    first_key = tl.load(first + batch.to(tl.int64) * num_queries + rows, mask=real, other=_NO_KEY)
    last_key = tl.load(last + batch.to(tl.int64) * num_queries + rows, mask=real, other=-1)
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)
    statistics = (batch * heads + head).to(tl.int64) * num_queries
    # exp2 of minus infinity: rows past the end have no weight.
    lse_rows = tl.load(lse + statistics + rows, mask=real, other=float("inf")) * _LOG2_E
    delta_rows = tl.load(delta + statistics + rows, mask=real, other=0.0)

    q_tile = 0
    d_tile = 0
    if CHUNK == COLUMNS:
        q_tile = _load(q_of, start, 0, HEAD_DIM, BLOCK_Q, COLUMNS, TMA)
        d_tile = _load(d_of, start, 0, HEAD_DIM, BLOCK_Q, COLUMNS, TMA)
    total = tl.zeros([BLOCK_Q, OWN], dtype=tl.float32)
    scale_2 = scale * _LOG2_E
    for step in range((end - begin) - (whole_end - whole_begin)):
        key_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_K
        total = _add_dq(
            total, q_tile, d_tile, q_of, d_of, start, k_of, k_own_of, v_of, key_start, first_key, last_key, lse_rows,
            delta_rows, own_column, scale_2,
            HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, True, UPCAST, TMA,
        )  # fmt: skip
    for step in range(whole_end - whole_begin):
        key_start = (whole_begin + step) * BLOCK_K
        total = _add_dq(
            total, q_tile, d_tile, q_of, d_of, start, k_of, k_own_of, v_of, key_start, first_key, last_key, lse_rows,
            delta_rows, own_column, scale_2,
            HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, False, UPCAST, TMA,
        )  # fmt: skip
    dq_of = (dq, batch, head, dq_batch, dq_head, dq_token, num_queries)
    _store(dq_of, start, own_column, total * scale, HEAD_DIM, BLOCK_Q, OWN, TMA)


@triton.jit
def _add_dk_dv(
    dk, dv, k_tile, v_tile, k, v, key_start, q, q_own, d_out, d_own, query_start, lse, delta, first, last, num_queries,
    own_column, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one query block's part of dk, without the factor `scale`, and of dv. Scores are held as [keys, queries]."""
    rows = query_start + tl.arange(0, BLOCK_Q)
    real = rows < num_queries
    if CHUNK == COLUMNS:
        q_tile = _load(q, query_start, 0, HEAD_DIM, BLOCK_Q, COLUMNS, TMA)
        scores = _product(k_tile, tl.trans(q_tile), UPCAST)
    else:
        scores = _product_in_chunks(
            k, key_start, q, query_start, HEAD_DIM, COLUMNS, CHUNK, DEPTH, BLOCK_K, BLOCK_Q, UPCAST, TMA
        )
    # exp2 of minus infinity: rows past the end have no weight, in full blocks too.
    lse_rows = tl.load(lse + rows, mask=real, other=float("inf")) * _LOG2_E
    weights = tl.exp2(scores * scale - lse_rows[None, :])
    if MASKED:
        keys = key_start + tl.arange(0, BLOCK_K)
        first_key = tl.load(first + rows, mask=real, other=_NO_KEY)
        last_key = tl.load(last + rows, mask=real, other=-1)
        visible = (keys[:, None] >= first_key[None, :]) & (keys[:, None] <= last_key[None, :])
        weights = tl.where(visible, weights, 0.0)
    own_d = _load(d_own, query_start, own_column, HEAD_DIM, BLOCK_Q, OWN, TMA)
    dv += _product(weights.to(own_d.dtype), own_d, UPCAST)
    if CHUNK == COLUMNS:
        if OWN == COLUMNS:
            d_tile = own_d
        else:
            d_tile = _load(d_out, query_start, 0, HEAD_DIM, BLOCK_Q, COLUMNS, TMA)
        d_weights = _product(v_tile, tl.trans(d_tile), UPCAST)
    else:
        d_weights = _product_in_chunks(
            v, key_start, d_out, query_start, HEAD_DIM, COLUMNS, CHUNK, DEPTH, BLOCK_K, BLOCK_Q, UPCAST, TMA
        )
    delta_rows = tl.load(delta + rows, mask=real, other=0.0)
    d_scores = weights * (d_weights - delta_rows[None, :])
    if CHUNK == COLUMNS and OWN == COLUMNS:
        own_q = q_tile
    else:
        own_q = _load(q_own, query_start, own_column, HEAD_DIM, BLOCK_Q, OWN, TMA)
    dk += _product(d_scores.to(own_q.dtype), own_q, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def backward_keys(
    q, q_own, k, v, d_out, d_own, lse, delta, dk, dv, first, last, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, d_batch, d_head, d_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    heads, group, num_queries, num_keys, num_blocks, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv, summed over the query heads of a group. The grid is (blocks of keys, G * column splits, B).

    `table` [B, blocks of keys, 4] has ranges of blocks of queries. `q_own`, `d_own` are `q`, `d_out` in tiles of OWN
    columns.
    """
    block = tl.program_id(0)
    key_heads = heads // group
    key_head = tl.program_id(1) % key_heads
    own_column = (tl.program_id(1) // key_heads) * OWN
    batch = tl.program_id(2)
    start = block * BLOCK_K
    k_of = (k, batch, key_head, k_batch, k_head, k_token, num_keys)
    v_of = (v, batch, key_head, v_batch, v_head, v_token, num_keys)
    first += batch.to(tl.int64) * num_queries
    last += batch.to(tl.int64) * num_queries
    begin, whole_begin, whole_end, end = _ranges(table, batch * num_blocks + block)

    k_tile = 0
    v_tile = 0
    if CHUNK == COLUMNS:
        k_tile = _load(k_of, start, 0, HEAD_DIM, BLOCK_K, COLUMNS, TMA)
        v_tile = _load(v_of, start, 0, HEAD_DIM, BLOCK_K, COLUMNS, TMA)
    dk_total = tl.zeros([BLOCK_K, OWN], dtype=tl.float32)
    dv_total = tl.zeros([BLOCK_K, OWN], dtype=tl.float32)
    scale_2 = scale * _LOG2_E
    for member in range(group):
        head = key_head * group + member
        q_of = (q, batch, head, q_batch, q_head, q_token, num_queries)
        q_own_of = (q_own, batch, head, q_batch, q_head, q_token, num_queries)
        d_of = (d_out, batch, head, d_batch, d_head, d_token, num_queries)
        d_own_of = (d_own, batch, head, d_batch, d_head, d_token, num_queries)
        statistics = (batch * heads + head).to(tl.int64) * num_queries
        for step in range((end - begin) - (whole_end - whole_begin)):
            query_start = _partial(step, begin, whole_begin, whole_end) * BLOCK_Q
            dk_total, dv_total = _add_dk_dv(
                dk_total, dv_total, k_tile, v_tile, k_of, v_of, start, q_of, q_own_of, d_of, d_own_of, query_start,
                lse + statistics, delta + statistics, first, last, num_queries, own_column, scale_2,
                HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, True, UPCAST, TMA,
            )  # fmt: skip
        for step in range(whole_end - whole_begin):
            query_start = (whole_begin + step) * BLOCK_Q
            dk_total, dv_total = _add_dk_dv(
                dk_total, dv_total, k_tile, v_tile, k_of, v_of, start, q_of, q_own_of, d_of, d_own_of, query_start,
                lse + statistics, delta + statistics, first, last, num_queries, own_column, scale_2,
                HEAD_DIM, COLUMNS, CHUNK, OWN, DEPTH, BLOCK_Q, BLOCK_K, False, UPCAST, TMA,
            )  # fmt: skip
    dk_of = (dk, batch, key_head, dk_batch, dk_head, dk_token, num_keys)
    dv_of = (dv, batch, key_head, dv_batch, dv_head, dv_token, num_keys)
    _store(dk_of, start, own_column, dk_total * scale, HEAD_DIM, BLOCK_K, OWN, TMA)
    _store(dv_of, start, own_column, dv_total, HEAD_DIM, BLOCK_K, OWN, TMA)
