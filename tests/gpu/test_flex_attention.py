"""Compiled FlexAttention on CUDA against the reference, at the shapes that its compiler once refused among others."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.data.collate import spans
from tests.kernels import test_flex
from tests.kernels.span_rows import needed_keys, packed_spans, rank_spans, shard_of
from tests.test_span_attention import deal
from vlm_kernels.span_attention import QueryShard, Spans, flex, reference

SHORT_ROWS = [(ratio, head_dim) for head_dim in test_flex.HEAD_DIMS for ratio in test_flex.RATIOS]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("ratio", "head_dim"), SHORT_ROWS)
def test_short_rows(ratio: int, head_dim: int, is_training: bool) -> None:
    """One row, in bf16; the host's tests show how the compiler's own choice fails here."""
    for length in test_flex.ROWS:
        place = torch.arange(length, dtype=torch.int32, device="cuda")[None]
        visible = Spans(torch.zeros_like(place), place)
        heads = (ratio * test_flex.KEY_HEADS, test_flex.KEY_HEADS, test_flex.KEY_HEADS)
        made = (torch.randn((length, 1, count, head_dim), device="cuda").bfloat16() for count in heads)
        inputs = [tensor.permute(1, 2, 0, 3).requires_grad_(is_training) for tensor in made]
        for window in test_flex.WINDOWS:
            check(inputs, visible, window, tolerance=2e-2)  # of the norm: bf16 keeps 8 bits


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 130])
def test_images_and_padding(head_dim: int, window: int | None) -> None:
    """Two rows in fp32, one of them shorter, all queries and half of them."""
    is_real = torch.arange(300) < torch.tensor([300, 283])[:, None]
    is_image = torch.zeros_like(is_real)
    is_image[0, 60:230] = is_image[1, 10:40] = True
    visible = Spans(*(bound.cuda() for bound in spans(is_real.int() - 1, is_image & is_real)))
    for queries in (visible, shard_of(visible, deal(2, 300, 20, 2)[0].cuda())):
        shapes = ((4, queries.low.shape[1]), (2, 300), (2, 300))
        inputs = [torch.randn((2, *shape, head_dim), device="cuda", requires_grad=True) for shape in shapes]
        check(inputs, queries, window, tolerance=5e-3)  # Triton's fp32 products may use TF32, 10 bits of mantissa


@pytest.mark.parametrize("window", [None, 200])
def test_packed_rows(window: int | None) -> None:
    """Many documents: all queries, a context rank's, and those over the keys that they need."""
    row = packed_spans(1100)
    rank = rank_spans(row, 128, 4, window)
    for visible, own_window in ((row, window), (rank, window), (needed_keys(rank, window, 128)[0], None)):
        shard = visible.shard and QueryShard(visible.shard.positions.cuda(), visible.num_keys)
        visible = Spans(visible.low.cuda(), visible.high.cuda(), shard)
        shapes = ((4, visible.low.shape[1]), (2, visible.num_keys), (2, visible.num_keys))
        inputs = [torch.randn((2, *shape, 64), device="cuda").bfloat16().requires_grad_() for shape in shapes]
        check(inputs, visible, own_window, tolerance=2e-2)


def check(inputs: list[torch.Tensor], visible: Spans, window: int | None, tolerance: float) -> None:
    """Output and gradients, by the norm of their difference."""
    is_training = inputs[0].requires_grad
    wide = [tensor.detach().double().requires_grad_(is_training) for tensor in inputs]
    scale = inputs[0].shape[-1] ** -0.5
    found, expected = (
        form(*given, visible, window, scale) for form, given in ((flex.attend, inputs), (reference, wide))
    )
    results = [(found, expected)]
    if is_training:
        gradient = torch.randn_like(found)
        ours = torch.autograd.grad(found, inputs, gradient)
        theirs = torch.autograd.grad(expected, wide, gradient.double())
        results += zip(ours, theirs, strict=True)
    for mine, other in results:
        assert (mine.double() - other).norm() <= tolerance * other.norm()
