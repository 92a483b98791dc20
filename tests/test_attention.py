"""Self-attention where ranks divide the sequence: every rank's queries over all keys are the whole computation.

Shapes: S sequence, Sq a context rank's part of it, B batch, H hidden, N query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.layers.attention import AttentionCore, SelfAttention
from megatron_vlm.layers.rope import rope_table
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import full_shape, gather_full, own_part
from tests.kernels.span_rows import shard_of
from tests.ranks import run_ranks
from tests.test_span_attention import LENGTH, ROWS, deal, make_spans
from vlm_kernels.span_attention import QueryShard, Spans

HIDDEN, BATCH, BLOCK = 24, len(ROWS), 2
# fp32 on both sides; sums of at most 160 terms of order one in another order. Measured: 1.2e-5 in values up to 46.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Layer:
    """Two query heads to a key head; images are longer than the window."""

    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 8
    window: int | None = 4
    softmax_scale: float = 0.4
    norm_eps: float = 1e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x_SB: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """[Sq, B, ...], of each sequence the tokens at its positions."""
    return x_SB[positions_BS.t().long(), torch.arange(x_SB.shape[1])]


def gathering(
    spans: Spans, dealt: list[torch.Tensor], rank: int, join: Callable[[torch.Tensor], torch.Tensor]
) -> Spans:
    """The spans of a rank's queries; `join` puts the parts [Sq, B, ...] of all ranks one after another."""
    order = torch.cat(dealt, dim=1).argsort(dim=1)

    def gather(
        k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, Spans]:
        k, v = rows_of(join(torch.stack((k, v), dim=2)), order).unbind(2)
        return k, v, spans.among(window, torch.arange(LENGTH, dtype=torch.int32), LENGTH)

    queries = shard_of(spans, dealt[rank])
    return Spans(queries.low, queries.high, QueryShard(dealt[rank], LENGTH, gather=gather))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_the_core_brings_keys_and_values_together(window: int | None, recompute: bool) -> None:
    """Two ranks in one process. Recomputation keeps a rank's own keys alone, and asks for the others again."""
    spans, dealt, core = make_spans(), deal(BATCH, LENGTH, BLOCK, 2), AttentionCore(window, 0.4, recompute)
    shapes = ((LENGTH, BATCH, heads, 8) for heads in (4, 2, 2))
    whole = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    weights = random(LENGTH, BATCH, 32, seed=3)
    expected = core(*whole, spans)
    (expected * weights).sum().backward()

    parts = [[rows_of(tensor.detach(), positions).requires_grad_() for tensor in whole] for positions in dealt]
    calls = []

    def join(own: torch.Tensor) -> torch.Tensor:
        calls.append(own)
        return torch.cat([torch.stack((k, v), dim=2) for _, k, v in parts])

    for rank, (q, k, v) in enumerate(parts):
        output = core(q, k, v, gathering(spans, dealt, rank, join))
        torch.testing.assert_close(output, rows_of(expected, dealt[rank]), **CLOSE)
        (output * rows_of(weights, dealt[rank])).sum().backward()
    assert len(calls) == (4 if recompute else 2)
    for rank, tensors in enumerate(parts):
        for mine, other in zip(tensors, whole, strict=True):
            torch.testing.assert_close(mine.grad, rows_of(other.grad, dealt[rank]), **CLOSE)


class _GatherRows(torch.autograd.Function):
    """The parts of all ranks, one after another; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        part = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        torch.distributed.reduce_scatter_tensor(part, gradient.contiguous(), group=ctx.group)
        return part, None


@dataclass(frozen=True)
class Results:
    """Of one context rank: its output and input gradient [Sq, B, H], and the gradients of whole parameters."""

    output: torch.Tensor
    x_grad: torch.Tensor
    parameter_grads: dict[str, torch.Tensor]


def attend(layout: Layout, recompute: bool) -> Results:
    """Self-attention with projections, norms and rotation, over blocks of tokens dealt at random."""
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    mcore_config = build_mcore_config(HIDDEN, 4, torch.float32, layout)
    attention = SelfAttention(HIDDEN, Layer(), mcore_config, groups.tp, "plain", recompute_core=recompute)
    with torch.no_grad():
        for seed, parameter in enumerate(attention.parameters()):
            whole = random(*full_shape(parameter, groups), seed=seed) * HIDDEN**-0.5
            parameter.copy_(own_part(whole, parameter, groups))

    dealt, rank = deal(BATCH, LENGTH, BLOCK, layout.context_size), groups.cp.rank()
    spans = gathering(make_spans(), dealt, rank, lambda own: _GatherRows.apply(own, groups.cp))
    if layout.context_size == 1:  # the plain form is what the others must equal
        dealt, spans = [torch.arange(LENGTH).repeat(BATCH, 1)], make_spans()
    tp = groups.tp if layout.sequence_parallel else groups.single_rank
    x = rows_of(random(LENGTH, BATCH, HIDDEN, seed=50), dealt[rank]).chunk(tp.size())[tp.rank()].requires_grad_()
    weights = rows_of(random(LENGTH, BATCH, HIDDEN, seed=51), dealt[rank]).chunk(tp.size())[tp.rank()]
    output = attention(x, rope_table(dealt[rank], 8, 1e4, 1.0, torch.float32), spans)
    (output * weights).sum().backward()
    grads = {name: _whole_gradient(parameter, groups) for name, parameter in attention.named_parameters()}
    joined = (_GatherRows.apply(part.detach(), tp) for part in (output, x.grad))
    return Results(*joined, grads)


def _whole_gradient(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    gradient = parameter.grad
    for group in (groups.cp, groups.tp) if spec_of(parameter).partial else (groups.cp,):
        torch.distributed.all_reduce(gradient, group=group)
    return gather_full(gradient, parameter, groups)


ONE_LAYER = ((0,),)
CP2 = Layout(context_size=2, chunks=ONE_LAYER)
CP4 = Layout(context_size=4, chunks=ONE_LAYER)
CP2_TP2_SP = Layout(context_size=2, tensor_size=2, sequence_parallel=True, chunks=ONE_LAYER)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [CP2, CP4, CP2_TP2_SP], ids=["CP2", "CP4", "CP2xTP2+SP"])
def test_context_ranks_make_the_whole(layout: Layout, recompute: bool) -> None:
    """Output and every gradient; nothing but the spans differs from a layer that has the whole sequence."""
    (expected,) = run_ranks(1, attend, Layout(chunks=ONE_LAYER), recompute)
    dealt = deal(BATCH, LENGTH, BLOCK, layout.context_size)
    results = run_ranks(layout.context_size * layout.tensor_size, attend, layout, recompute)
    for rank, result in enumerate(results):
        own = dealt[rank // layout.tensor_size]
        torch.testing.assert_close(result.output, rows_of(expected.output, own), **CLOSE)
        torch.testing.assert_close(result.x_grad, rows_of(expected.x_grad, own), **CLOSE)
        assert result.parameter_grads.keys() == expected.parameter_grads.keys()
        for name, gradient in result.parameter_grads.items():
            torch.testing.assert_close(gradient, expected.parameter_grads[name], **CLOSE)
