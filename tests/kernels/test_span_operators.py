"""Span attention's operators, their tables of blocks, and the choice between forms on a GPU.

Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.test_span_attention import (
    LENGTH,
    check_shards,
    image_shard_spans,
    make_spans,
    make_tensors,
    packed_shard_spans,
    packed_spans,
    results,
)
from vlm_kernels.span_attention import QueryShard, Spans, blocks, flex, operators, reference, span_attention
from vlm_kernels.span_attention.blocks import Blocks, Configuration

LAUNCHES = Configuration(Blocks(16, 8, 4, 1), Blocks(8, 16, 4, 1), Blocks(8, 8, 4, 1))
WINDOWS = (None, 1, 7, LENGTH)
KINDS = (make_spans, packed_spans, image_shard_spans, packed_shard_spans)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of block sizes without a GPU; the operators' references do not look at the tables."""
    monkeypatch.setattr(operators, "_launches", lambda q: LAUNCHES)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
def test_operator_is_the_reference(make, window, heads) -> None:  # type: ignore[no-untyped-def]
    spans, shape = make(), {"heads": heads[0], "key_heads": heads[1]}
    ours, theirs = (results(form, spans, window, **shape) for form in (operators.attend, reference))
    for mine, other in zip(ours, theirs, strict=True):
        # float64 on both sides.
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Arithmetic in fp32, one rounding of each result: within half a unit in the last place, and fp32's own error."""
    spans = make_spans()
    q, k, v = make_tensors(spans.low.shape[0], dtype)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    out, exact = operators.attend(q, k, v, spans, 7, 0.3), reference(*inputs, spans, 7, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ours = torch.autograd.grad(out, (q, k, v), weights)
    theirs = torch.autograd.grad(exact, inputs, weights.double())
    for mine, other in zip(ours, theirs, strict=True):
        # The backward pass reads the rounded output: an error of eps / 2 in delta, times sums of up to 40 weights.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), other, rtol=2 * eps, atol=8 * eps + 1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("make", [make_spans, packed_spans])
def test_shards_of_queries_make_the_whole(make, window) -> None:  # type: ignore[no-untyped-def]
    check_shards(operators.attend, make(), window, 2)


def _arguments(make: Callable[[], Spans], dtype: torch.dtype, **shape: int) -> tuple[Any, ...]:
    """What the operator takes, for one row of documents."""
    spans = make()
    q, k, v = make_tensors(1, dtype, length=spans.low.shape[1], num_keys=spans.num_keys, **shape)
    ranges = [spans.block_ranges(7, launch) for launch in (LAUNCHES.forward, LAUNCHES.queries, LAUNCHES.keys)]
    tables = (ranges[0].by_query, ranges[1].by_query, ranges[2].by_key)
    return q, k, v, spans.first_key(7), spans.high, *tables, 0.3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [packed_spans, packed_shard_spans])
def test_operators_are_well_formed(make) -> None:  # type: ignore[no-untyped-def]
    q, k, v, *others = _arguments(make, torch.float32)
    torch.library.opcheck(torch.ops.vlm_kernels.span_attention.default, (q, k, v, *others))
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    out, lse = operators._attention(q, k, v, *others)
    first, last, _, *tables_and_scale = others
    arguments = (torch.randn_like(out), q, k, v, out, lse, first, last, *tables_and_scale)
    torch.library.opcheck(operators._attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("make", [packed_spans, packed_shard_spans])
def test_gradcheck(make) -> None:  # type: ignore[no-untyped-def]
    arguments = _arguments(make, torch.float64, heads=2, key_heads=1)
    others = arguments[3:]
    q, k, v = (tensor[..., :4].detach().requires_grad_() for tensor in arguments[:3])
    assert torch.autograd.gradcheck(
        lambda *inputs: operators._attention(*inputs, *others)[0], (q, k, v), fast_mode=True
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [make_spans, image_shard_spans])
def test_recomputation_and_compilation(make) -> None:  # type: ignore[no-untyped-def]
    spans = make()
    expected = results(operators.attend, spans, 7)
    forms = (
        lambda *inputs: checkpoint(operators.attend, *inputs, use_reentrant=False),
        torch.compile(operators.attend, backend="aot_eager", fullgraph=True),
    )
    for form in forms:
        for mine, other in zip(results(form, spans, 7), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def _scattered() -> Spans:
    """Bounds in no order, and queries that see nothing."""
    bounds = torch.randint(
        0, LENGTH, (2, 3, LENGTH // 4), generator=torch.Generator().manual_seed(3), dtype=torch.int32
    )
    low, high = bounds.repeat_interleave(4, dim=2)
    return Spans(low, high)


def _scattered_shard() -> Spans:
    """The same for a third of the queries."""
    whole = _scattered()
    positions = torch.arange(0, LENGTH, 3, dtype=torch.int32).repeat(3, 1)
    return Spans(whole.low[:, ::3], whole.high[:, ::3], QueryShard(positions, LENGTH))


def _more_queries_than_keys() -> Spans:
    """Every key is asked for twice."""
    low, high = (torch.arange(2 * LENGTH, dtype=torch.int32)[None] // 2 + shift for shift in (-5, 3))
    return Spans(low.clamp(min=0), high.clamp(max=LENGTH - 1), QueryShard((low + 5).contiguous(), LENGTH))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("make", [*KINDS, _scattered, _scattered_shard, _more_queries_than_keys])
@pytest.mark.parametrize("sizes", [(8, 8), (16, 8), (8, 16), (12, 7)])
def test_ranges_of_blocks(make, window, sizes) -> None:  # type: ignore[no-untyped-def]
    """Every visible pair is in a range, whole blocks are seen whole, and ranges of queries are as narrow as can be."""
    spans = make()
    queries, keys = sizes
    ranges = spans.block_ranges(window, Blocks(queries, keys, 4, 1))
    for batch, visible in enumerate(spans.dense(window)[:, 0]):
        tiles = [rows.split(keys, dim=1) for rows in visible.split(queries, dim=0)]
        touched = torch.tensor([[bool(tile.any()) for tile in row] for row in tiles])
        covered = torch.tensor([[bool(tile.all()) and tile.shape[1] == keys for tile in row] for row in tiles])
        for own, table in ((0, ranges.by_query[batch].tolist()), (1, ranges.by_key[batch].tolist())):
            assert len(table) == touched.shape[own]
            for block, (begin, whole, whole_end, end) in enumerate(table):
                seen, full = touched.select(own, block), covered.select(own, block)
                assert 0 <= begin <= whole <= whole_end <= end <= len(seen)
                assert not seen[:begin].any() and not seen[end:].any()
                assert full[whole:whole_end].all()
                if own == 0 and seen.any():
                    assert seen[begin] and seen[end - 1]
                    assert whole_end - whole == full.sum(), "what all queries see is one run of keys"


def test_ranges_are_kept_for_all_layers() -> None:
    spans = make_spans()
    assert spans.block_ranges(7, LAUNCHES.forward) is spans.block_ranges(7, LAUNCHES.forward)
    assert spans.block_ranges(7, LAUNCHES.forward) is not spans.block_ranges(None, LAUNCHES.forward)
    assert spans.first_key(7) is spans.first_key(7)
    assert spans.first_key(None) is spans.low


def test_only_proven_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes FlexAttention for every head dim, capability and dtype but those in the table."""
    import vlm_kernels.span_attention as module

    calls = []
    monkeypatch.setattr(module, "is_on_gpu", lambda q: True)
    monkeypatch.setattr(blocks, "compute_capability", lambda q: (9, 0))
    monkeypatch.setattr(flex, "attend", lambda q, *others: calls.append("flex") or q)
    monkeypatch.setattr(operators, "attend", lambda q, *others: calls.append("ours") or q)
    half, single = torch.zeros((1, 1, 4, 64), dtype=torch.bfloat16), torch.zeros((1, 1, 4, 64))
    for pairs in (frozenset(), frozenset({(128, (9, 0)), (64, (8, 0))}), frozenset({(64, (9, 0))})):
        monkeypatch.setattr(blocks, "PROVEN", pairs)
        for q in (half, single):
            span_attention(q, q, q, make_spans(), None, 1.0)
    assert calls == ["flex"] * 4 + ["ours", "flex"]


def test_every_proven_pair_has_a_launch() -> None:
    for head_dim, (major, _) in blocks.PROVEN:
        assert blocks.configuration(head_dim, major)
