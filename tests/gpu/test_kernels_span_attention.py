"""Span attention's kernels on CUDA against fp64: new inputs in every run, memory that is NaN before a kernel writes it.

Every head dim of the table runs here, proven or not; passing here is what `blocks.PROVEN` asks for.
Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from tests.kernels.span_rows import needed_keys, packed_spans, rank_spans, shard_of
from vlm_kernels.span_attention import QueryShard, Spans, operators, reference
from vlm_kernels.span_attention.blocks import CONFIGURATIONS, columns_of

KINDS = ["causal", "images", "documents", "segments", "empty", "shard"]
HEAD_DIMS = [64, 72, 80, 128, 256, 512]
# Rounding of bf16 and fp16 operands: of weights in the second products, and of the results.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def has_launches() -> None:
    major = torch.cuda.get_device_capability()[0]
    if (64, major) not in CONFIGURATIONS:
        pytest.skip(f"no launches for compute capability {major}")


def spans_of(kind: str, length: int) -> Spans:
    """Two rows, as the data path makes them: text with an image, with padding at the end, or packed documents.

    A shard is half the queries of the first kind: blocks of 64 in random order, in each row another. "needed" are the
    queries of one of two ranks, to which blocks of many documents were dealt by their load.
    """
    if kind == "needed":
        return rank_spans(packed_spans(length), 128, 2)
    place = torch.arange(length, dtype=torch.int32)
    low, high = torch.zeros((2, length), dtype=torch.int32), place.repeat(2, 1)
    if kind in ("images", "shard"):
        high[0, 130:400], high[1, 3:40] = 399, 39
        low[1, -57:] = place[-57:]
    elif kind == "documents":
        for row, borders in enumerate(((0, 300, 513), (0, 1, 700))):
            for begin in borders:
                low[row, begin:] = begin
        high[0, 320:470] = 469
    elif kind == "segments":
        for row, borders in enumerate(((0, 5, 256, length), (0, 391, length))):
            for begin, end in pairwise(borders):
                low[row, begin:end], high[row, begin:end] = begin, end - 1
    elif kind == "empty":  # whole blocks of queries, and single ones
        low[0, 200:500], high[0, 200:500] = 5, 4
        low[1, ::3], high[1, ::3] = length, -1
    if kind == "shard":
        blocks = place[: length // 64 * 64].view(-1, 64)
        positions = torch.stack([blocks[torch.randperm(len(blocks))[: len(blocks) // 2]].flatten() for _ in range(2)])
        return shard_of(Spans(low, high), positions)
    return Spans(low, high)


def moved(spans: Spans) -> Spans:
    """The same on the device."""
    shard = spans.shard and QueryShard(spans.shard.positions.cuda(), spans.num_keys)
    return Spans(spans.low.cuda(), spans.high.cuda(), shard)


def check(
    head_dim: int, kind: str, window: int | None, length: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Output and gradients have the errors of rounding weights and results once, and no others."""
    spans = spans_of(kind, length)
    if kind == "needed":
        spans, window = needed_keys(spans, window, 128)[0], None
    spans = moved(spans)
    # Tokens before heads in memory, as projections write them, and all three in one tensor where they fit.
    packed = torch.randn((length, 2, heads[0] + 2 * heads[1], head_dim), device="cuda").to(dtype).permute(1, 2, 0, 3)
    q, k, v = packed.split((heads[0], heads[1], heads[1]), dim=1)
    inputs = [
        tensor.requires_grad_()
        for tensor in (q[:, :, : spans.low.shape[1]], k[:, :, : spans.num_keys], v[:, :, : spans.num_keys])
    ]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    scale = head_dim**-0.5
    ours, exact = (
        form(*tensors, spans, window, scale) for form, tensors in ((operators.attend, inputs), (reference, wide))
    )
    gradient = torch.randn_like(ours)
    results = [ours, *torch.autograd.grad(ours, inputs, gradient)]
    expected = [exact, *torch.autograd.grad(exact, wide, gradient.double())]
    for name, result, wanted in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert not result.isnan().any(), name
        error = (result.double() - wanted).abs()
        # The largest value sets the size of the terms that are rounded; the mean shows errors that many entries have.
        # With these roundings done in fp64: at most 1.4 and 0.6. A single token's exact dq is zero: 1e-5 for fp32.
        assert error.max() <= 2 * ROUNDING[dtype] * wanted.abs().max() + 1e-5, name
        assert error.mean() <= ROUNDING[dtype] * wanted.abs().mean() + 1e-5, name


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kind", "window"), [*product(KINDS, (None, 130)), ("needed", 130)])
def test_against_fp64(kind: str, window: int | None, head_dim: int) -> None:
    check(head_dim, kind, window, 777, (4, 2), torch.bfloat16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "length"), [((1, 1), 1), ((8, 1), 1024), ((3, 3), 129)])
def test_sizes(heads: tuple[int, int], length: int, head_dim: int) -> None:
    check(head_dim, "causal", None, length, heads, torch.bfloat16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fp16(head_dim: int) -> None:
    check(head_dim, "images", 200, 777, (2, 1), torch.float16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_past_two_to_the_31_elements(head_dim: int) -> None:
    """Trap: offsets of late tokens. Heads lie far apart in memory; the last ones equal a contiguous copy of them."""
    length, stride = 2048, 2**31 // 2048 + 2**17
    storage = torch.empty(length * stride, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((1, 1, length, head_dim), (length * stride, stride, stride, 1))
    far.copy_(torch.randn(far.shape, device="cuda"))
    place = torch.arange(length, dtype=torch.int32, device="cuda")
    spans = Spans(torch.zeros_like(place)[None], place[None])
    near = far.clone(memory_format=torch.contiguous_format)
    ours, theirs = (operators.attend(q, q, q, spans, None, head_dim**-0.5) for q in (far, near))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_every_head_dim_of_the_table_is_here() -> None:
    assert {columns_of(head_dim) for head_dim in HEAD_DIMS} == {columns for columns, _ in CONFIGURATIONS}
