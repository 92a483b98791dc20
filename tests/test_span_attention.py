"""Span attention against an explicit softmax per query, in both of its forms.

The form for GPUs runs here too: FlexAttention without compilation is correct on the host, forward and backward, once
its check of the device is lifted (tests only).
Shapes: B batch, N query heads, G key/value heads, S sequence, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from megatron_vlm.data.collate import spans
from tests.kernels.span_rows import needed_keys, rank_spans, shard_of
from tests.kernels.span_rows import packed_spans as many_documents
from tests.sizes import full
from vlm_kernels.span_attention import QueryShard, Spans, operators, reference, span_attention
from vlm_kernels.span_attention import flex as module


@dataclass(frozen=True)
class Row:
    """Real tokens, and images as (first token, tokens)."""

    real: int
    images: tuple[tuple[int, int], ...] = ()


LENGTH = 40
ROWS = (
    Row(LENGTH, ((3, 6), (9, 6), (25, 4))),  # two images side by side, one far away
    Row(LENGTH),
    Row(23, ((0, 5), (18, 5))),  # an image at each end, then padding
    Row(11, ((2, 9),)),  # an image longer than the window
)
WINDOWS = (None, 1, 4, 7, LENGTH)


def make_spans(rows: tuple[Row, ...] = ROWS, length: int = LENGTH) -> Spans:
    place = torch.arange(length)
    is_real = torch.stack([place < row.real for row in rows])
    image = torch.full((len(rows), length), -1)
    for index, row in enumerate(rows):
        for number, (first, tokens) in enumerate(row.images):
            image[index, first : first + tokens] = number
    # Images that touch stay apart here, as ranges allow and later families ask for.
    low, high = spans(is_real.int() - 1, torch.zeros_like(is_real))
    for index, row in enumerate(rows):
        for first, tokens in row.images:
            high[index, first : first + tokens] = first + tokens - 1
    return Spans(low, high)


def packed_spans() -> Spans:
    """Three documents in one row, an image in the second: what packing will ask for."""
    low = torch.repeat_interleave(torch.tensor([0, 9, 30]), torch.tensor([9, 21, 10]))
    high = torch.arange(LENGTH)
    high[12:18] = 17
    return Spans(low[None].int(), high[None].int())


def causal_spans() -> Spans:
    """Whole rows of text, which need no mask."""
    return make_spans((Row(LENGTH), Row(LENGTH)))


def deal(batch: int, length: int, block: int, parts: int) -> list[torch.Tensor]:
    """Positions [B, Sq] of the queries of every context rank: blocks of tokens in random order, another in each row."""
    generator = torch.Generator().manual_seed(7)
    dealt = []
    for _ in range(batch):
        blocks = torch.arange(length, dtype=torch.int32).split(block)
        order = torch.randperm(length // block, generator=generator)
        dealt.append([torch.cat([blocks[index] for index in part]) for part in order.tensor_split(parts)])
    return [torch.stack(rows) for rows in zip(*dealt, strict=True)]


def image_shard_spans() -> Spans:
    """Images and padding, seen by the first of two context ranks."""
    return shard_of(make_spans(), deal(len(ROWS), LENGTH, 4, 2)[0])


def packed_shard_spans() -> Spans:
    """Documents, seen by the second of three context ranks."""
    return shard_of(packed_spans(), deal(1, LENGTH, 4, 3)[1])


def make_tensors(
    batch: int,
    dtype: torch.dtype = torch.float64,
    heads: int = 4,
    key_heads: int = 2,
    length: int = LENGTH,
    num_keys: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`length` queries, and as many keys where nothing else is asked for."""
    generator = torch.Generator().manual_seed(0)
    key_shape = (key_heads, num_keys or length)
    q, k, v = (
        torch.randn((batch, *shape, 16), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((heads, length), key_shape, key_shape)
    )
    return q, k, v


def by_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """The definition: each query's softmax over the keys between its bounds, one query at a time."""
    batch, heads, length, _ = q.shape
    rows = []
    for b in range(batch):
        for n in range(heads):
            group = n // (heads // k.shape[1])
            for query in range(length):
                first, last = int(spans.low[b, query]), int(spans.high[b, query])
                if window is not None:
                    position = query if spans.shard is None else int(spans.shard.positions[b, query])
                    first = max(first, position - window + 1)
                keys, values = k[b, group, first : last + 1], v[b, group, first : last + 1]
                rows.append(torch.softmax(keys @ q[b, n, query] * scale, dim=0) @ values)
    return torch.stack(rows).view(batch, heads, length, -1)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, "int | None", float], torch.Tensor]


def results(
    attention: Attention, spans: Spans, window: int | None, dtype: torch.dtype = torch.float64, **shape: int
) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v."""
    batch, length = spans.low.shape
    q, k, v = make_tensors(batch, dtype, length=length, num_keys=spans.num_keys, **shape)
    output = attention(q, k, v, spans, window, 0.3)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in (q, k, v))]


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attention]:
    """The form for GPUs, not compiled, with the check of the device lifted."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(module, "compiled", lambda: flex_attention)
    yield module.attend


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("make", [make_spans, packed_spans, causal_spans, image_shard_spans, packed_shard_spans])
def test_reference_is_the_definition(make: Callable[[], Spans], window: int | None) -> None:
    spans = make()
    ours, theirs = results(reference, spans, window), results(by_query, spans, window)
    for mine, other in zip(ours, theirs, strict=True):
        # float64 on both sides: sums of up to 40 terms in another order.
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


# fp32 on both sides, with sums of up to 300 terms in another order. Measured: at most 3.1e-6 absolute.
FLEX = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("make", [make_spans, packed_spans, image_shard_spans, packed_shard_spans])
def test_flex_attention_is_the_reference(flex: Attention, make: Callable[[], Spans], window: int | None) -> None:
    spans = make()
    ours, theirs = (results(form, spans, window, torch.float32) for form in (flex, reference))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **FLEX)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("heads", "key_heads"), [full(4, 4), (6, 1), (2, 2)])
def test_flex_attention_over_several_blocks(flex: Attention, heads: int, key_heads: int) -> None:
    """Longer than two blocks of 128 and no multiple of them; an image lies across a border of blocks."""
    length = 300
    spans = make_spans((Row(length, ((120, 20),)), Row(200, ((150, 50),))), length)
    for window in (None, 60):
        shape = {"heads": heads, "key_heads": key_heads}
        for queries in (spans, *(shard_of(spans, positions) for positions in deal(2, length, 20, 2))):
            ours, theirs = (results(form, queries, window, torch.float32, **shape) for form in (flex, reference))
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, **FLEX)
    # The window leaves out whole blocks: that is what the block mask is for.
    assert spans.block_mask(60).sparsity() > spans.block_mask(None).sparsity()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [None, 200])
def test_flex_attention_of_packed_rows(flex: Attention, window: int | None) -> None:
    """Documents of one token to several blocks, all queries and those of planned blocks of 128 tokens."""
    row = many_documents(600)
    for visible in (row, rank_spans(row, 128, 2, window)):
        ours, theirs = (results(form, visible, window, torch.float32) for form in (flex, reference))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, **FLEX)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("length", "block", "ranks", "window"), [(600, 128, 4, 100), full(1100, 256, 4, 100)])
def test_flex_attention_to_needed_keys(flex: Attention, length: int, block: int, ranks: int, window: int) -> None:
    """A rank's queries over the keys that they see within a window: the result over all keys, and all gradients."""
    rank = rank_spans(many_documents(length), block, ranks, window)
    spans, keys = needed_keys(rank, window, block)
    assert len(keys) < length
    batch, num_queries = rank.low.shape
    tensors = make_tensors(batch, torch.float32, length=num_queries, num_keys=length)
    weights = torch.randn((batch, 4, num_queries, 16), generator=torch.Generator().manual_seed(1))
    q, k, v = tensors
    found = []
    for output in (flex(q, k[:, :, keys], v[:, :, keys], spans, None, 0.3), reference(q, k, v, rank, window, 0.3)):
        found.append([output, *torch.autograd.grad(output, tensors, weights)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **FLEX)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_of_queries_that_see_nothing(flex: Attention) -> None:
    """Their output is zero and no gradient comes from them: whole blocks of queries, and single ones."""
    rank = rank_spans(many_documents(600), 128, 2)
    rank.low[0, 100:], rank.high[0, 100:] = 600, -1
    rank.low[1, ::3], rank.high[1, ::3] = 600, -1
    ours, theirs = (results(form, rank, None, torch.float32) for form in (flex, operators.attend))
    assert not ours[0][0, :, 100:].any()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **FLEX)


def check_shards(attention: Attention, spans: Spans, window: int | None, parts: int) -> None:
    """Context ranks' queries over the whole keys give the whole result and gradients."""
    batch = spans.low.shape[0]
    whole, shards = make_tensors(batch), make_tensors(batch)
    weights = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = attention(*whole, spans, window, 0.3)
    (expected * weights).sum().backward()
    q, k, v = shards
    for positions in deal(batch, LENGTH, 4, parts):
        index = positions.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        output = attention(q.gather(2, index), k, v, shard_of(spans, positions), window, 0.3)
        (output * weights.gather(2, index)).sum().backward()
        torch.testing.assert_close(output, expected.gather(2, index), rtol=1e-11, atol=1e-12)
    for mine, other in zip(shards, whole, strict=True):
        # float64 on both sides: the gradients of keys are summed over shards.
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("make", [make_spans, packed_spans, causal_spans])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shards_of_queries_make_the_whole(parts: int, make: Callable[[], Spans], window: int | None) -> None:
    check_shards(reference, make(), window, parts)


def test_positions_are_checked() -> None:
    spans = image_shard_spans()
    assert spans.shard is not None
    for positions in (spans.shard.positions.long(), spans.shard.positions[:, 1:]):
        with pytest.raises(AssertionError):
            Spans(spans.low, spans.high, QueryShard(positions, LENGTH))


def test_only_whole_rows_of_one_text_need_no_mask() -> None:
    assert causal_spans().all_causal
    # Not even where the order happens to be that of the keys: nobody waits for the device to learn that.
    assert not shard_of(causal_spans(), torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1)).all_causal
    assert not packed_spans().all_causal
    assert not any(make_spans((row,)).all_causal for row in ROWS if row != Row(LENGTH))


def test_block_masks_are_kept_one_per_window() -> None:
    spans = make_spans()
    assert spans.block_mask(4) is spans.block_mask(4)
    assert spans.block_mask(None) is spans.block_mask(None)
    assert spans.block_mask(4) is not spans.block_mask(None)
    assert len(spans._block_masks) == 2
    assert not make_spans()._block_masks, "micro-batches do not share masks"


def test_masks_are_those_of_transformers() -> None:
    """Visible keys of real tokens, from the data path's own ranges; two images side by side are one block in both."""
    place = torch.arange(LENGTH)
    is_real = torch.stack([place < row.real for row in ROWS])
    is_image = torch.zeros_like(is_real)
    for index, row in enumerate(ROWS):
        for first, tokens in row.images:
            is_image[index, first : first + tokens] = True
    theirs = create_masks_for_vision_model(
        config=Gemma3TextConfig(sliding_window=7, attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(len(ROWS), LENGTH, 1),
        attention_mask=is_real.long(),
        past_key_values=None,
        position_ids=place[None],
        block_sequence_ids=get_block_sequence_ids_for_mask(is_image.long()),
    )
    ours = Spans(*spans(is_real.int() - 1, is_image))
    both_real = is_real[:, None, :, None] & is_real[:, None, None, :]
    for window, kind in ((None, "full_attention"), (7, "sliding_attention")):
        assert torch.equal(ours.dense(window)[both_real], theirs[kind].expand_as(both_real)[both_real])


def test_padding_sees_only_itself() -> None:
    """Its output is its own value, so it is finite and nobody else's depends on it."""
    spans = make_spans()
    q, k, v = make_tensors(len(ROWS))
    output = span_attention(q, k, v, spans, None, 1 / math.sqrt(16))
    padding = output[3, :, 11:]
    torch.testing.assert_close(padding, v[3, :, 11:].repeat_interleave(2, dim=0))
    (gradient,) = torch.autograd.grad(output[3, :, :11].sum(), v)
    assert not gradient[3, :, 11:].any()


@pytest.mark.parametrize("window", WINDOWS)
def test_flops_are_those_of_visible_pairs(window: int | None) -> None:
    """Two products forward; backward four, and the scores again."""
    spans, tensors = packed_spans(), make_tensors(1)
    pairs = int(spans.dense(window).sum())
    with FlopCounterMode(display=False) as counter:
        output = operators.attend(*tensors, spans, window, scale=0.25)
    assert counter.get_total_flops() == 2 * (2 * 4 * 16 * pairs)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * (2 * 4 * 16 * pairs)
