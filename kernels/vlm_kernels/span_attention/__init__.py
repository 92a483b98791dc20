"""Attention over spans: every query sees a range of keys, limited by its layer's window on the past side.

Key k is visible to query q iff `low[q] <= k <= high[q]` and `position[q] - k < window` (`spans.py`).

Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys (equal unless queries are a shard), D head dim.
"""

from __future__ import annotations

import torch

from vlm_kernels.device import is_fake, is_on_gpu
from vlm_kernels.span_attention import flex, operators, transformer_engine
from vlm_kernels.span_attention.blocks import is_proven
from vlm_kernels.span_attention.reference import reference
from vlm_kernels.span_attention.spans import Backend, Documents, QueryShard, Spans

__all__ = ["Backend", "Documents", "QueryShard", "Spans", "reference", "span_attention"]


def span_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Compute grouped-query attention over spans, without a dense mask on a GPU.

    Args:
        q: queries [B, N, Sq, D].
        k: keys [B, G, Sk, D].
        v: values [B, G, Sk, D].
        spans: visible key ranges, and the positions of the queries in the sequence of keys.
        window: number of keys visible on the past side, the query included; None is unlimited.
        scale: factor on the scores.

    Returns:
        The output, [B, N, Sq, D].
    """
    return (_on_gpu if is_on_gpu(q) else reference)(q, k, v, spans, window, scale)


def _on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Run the first that may: our operator for fake tensors, Transformer Engine, our operator, FlexAttention.

    Nothing here makes the host wait: what decides are shapes, dtypes and what the host knows of spans.
    """
    if is_fake(q):
        form = operators.attend
    elif transformer_engine.takes(q, spans, window):
        form = transformer_engine.attend
    elif spans.backend == "auto" and is_proven(q):
        form = operators.attend
    else:
        form = flex.attend
    return form(q, k, v, spans, window, scale)
