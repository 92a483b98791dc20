"""The operators of span attention, whose kernels for GPUs are written in Triton.

`first` and `last` [B, Sq] int32 are the indices of the first and last visible key of a query, the window included:
nothing else depends on a query's position. The tables are `BlockRanges` for the launches of the forward pass (by
query), of dq (by query), and of dk with dv (by key); the reference needs none.

Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vlm_kernels.device import compute_capability
from vlm_kernels.library import define
from vlm_kernels.span_attention.blocks import Configuration, configuration
from vlm_kernels.span_attention.reference import backward as reference_backward
from vlm_kernels.span_attention.reference import forward as reference_forward
from vlm_kernels.span_attention.spans import Spans


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Compute `span_attention` by our operators: their kernels on a GPU, proven or not, the reference elsewhere."""
    launches = _launches(q)
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    tables = [
        spans.block_ranges(window, launches.forward).by_query,
        spans.block_ranges(window, launches.queries).by_query,
        spans.block_ranges(window, launches.keys).by_key,
    ]
    return _attention(q, k, v, spans.first_key(window), spans.high, *tables, scale)[0]


def _launches(q: torch.Tensor) -> Configuration:
    capability = compute_capability(q)
    # Without a GPU any will do: it only sets the tables' block sizes, and the reference does not read the tables.
    return configuration(q.shape[-1], capability[0]) if capability else configuration(64, 9)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *_, scale = others
    return reference_forward(q, k, v, first, last, scale)


def _kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    forward_table: torch.Tensor,
    by_query: torch.Tensor,
    by_key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from vlm_kernels.span_attention import launch  # needs Triton

    return launch.forward(q, k, v, first, last, forward_table, scale, _launches(q))


def _fake(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, first, last, _, by_query, by_key, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # zeros for its gradient would be a launch
    ctx.save_for_backward(q, k, v, out, lse, first, last, by_query, by_key)


def _backward(ctx: Any, d_out: torch.Tensor | None, d_lse: None) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 9
    gradients = _attention_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return (*gradients, *[None] * 6)


def _reference_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    out, lse, first, last, _, _, scale = others
    return reference_backward(d_out, q, k, v, out, lse, first, last, scale)


def _kernel_backward(d_out: torch.Tensor, q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    from vlm_kernels.span_attention import launch  # needs Triton

    gradients: tuple[torch.Tensor, ...] = launch.backward(d_out, q, *others, _launches(q))  # type: ignore[call-arg]
    return gradients


def _fake_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_attention = define(
    "span_attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor forward_table, Tensor by_query, "
    "Tensor by_key, float scale) -> (Tensor out, Tensor lse)",
    _reference,
    _fake,
    _backward,
    _save,
    kernel=_kernel,
)
_attention_backward = define(
    "span_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor first, "
    "Tensor last, Tensor by_query, Tensor by_key, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    _reference_backward,
    _fake_backward,
    kernel=_kernel_backward,
)


@register_flop_formula(torch.ops.vlm_kernels.span_attention, get_raw=True)
def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *spans: Any, **_: Any) -> int:
    """FLOPs of two matmuls over the pairs of a query and a key that it sees."""
    first, last = spans[:2]
    pairs = int((last - first + 1).clamp(min=0).sum())
    return 2 * 2 * q.shape[1] * q.shape[-1] * pairs


@register_flop_formula(torch.ops.vlm_kernels.span_attention_backward, get_raw=True)
def _backward_flops(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, **_: Any
) -> int:
    """FLOPs of four matmuls for gradients, and of the scores computed again."""
    return 5 * _flops(q, k, v, *others[2:4]) // 2
