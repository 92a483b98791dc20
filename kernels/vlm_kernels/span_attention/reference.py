"""Reference of span attention in plain PyTorch: what the host runs, and explicit formulas that define the operators.

Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlm_kernels.span_attention.spans import Spans


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Compute `span_attention` with a dense mask, which lives for this call only, or without one if it is causal."""
    if (window is None or window >= q.shape[2]) and spans.all_causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return scaled_dot_product_attention(q, k, v, attn_mask=spans.dense(window), scale=scale, enable_gqa=True)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, N, Sq, D] in q's dtype and layout, and the log-sum-exp [B, N, Sq].

    A query that sees no key has output zero and log-sum-exp -inf.
    """
    dtype = _accumulation_dtype(q)
    scores, values = _scores(q, k, first, last, scale), _per_query_head(v, q).to(dtype)
    lse = scores.logsumexp(-1)
    out = torch.empty_like(q)
    out.copy_(_weights(scores, lse) @ values)
    return out, lse


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of q, k and v, in their dtypes and memory layouts."""
    dtype = _accumulation_dtype(q)
    queries, d_out, out = q.to(dtype), d_out.to(dtype), out.to(dtype)
    keys, values = (_per_query_head(tensor, q).to(dtype) for tensor in (k, v))
    weights = _weights(_scores(q, k, first, last, scale), lse)
    delta = (out * d_out).sum(-1, keepdim=True)
    d_scores = weights * (d_out @ values.mT - delta) * scale
    per_head = (d_scores.mT @ queries, weights.mT @ d_out)
    dk, dv = (tensor.unflatten(1, (k.shape[1], -1)).sum(2) for tensor in per_head)
    gradients = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
    for gradient, value in zip(gradients, (d_scores @ keys, dk, dv), strict=True):
        gradient.copy_(value)
    return gradients


def _accumulation_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _per_query_head(tensor: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1)


def _scores(q: torch.Tensor, k: torch.Tensor, first: torch.Tensor, last: torch.Tensor, scale: float) -> torch.Tensor:
    dtype = _accumulation_dtype(q)
    key = torch.arange(k.shape[2], device=k.device)
    visible = (key >= first[..., None]) & (key <= last[..., None])
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT * scale
    return scores.masked_fill(~visible.unsqueeze(1), float("-inf"))


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # Where a query sees nothing, -inf minus -inf would be NaN.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
