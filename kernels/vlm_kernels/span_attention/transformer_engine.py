"""Span attention by NVIDIA Transformer Engine where it is installed: cuDNN's fused attention, or flash-attn through it.

It computes what consists of consecutive documents of which each query sees all keys, or those up to itself and within
a window: text, packed or not, layers to which images are causal, and the frames of towers. Ranges that see ahead, and
shards of queries, have no form there.

Documents of all rows lie one after the other, padding included ("thd"). cuDNN builds a plan for each shape; of this
form only, Transformer Engine rounds the number of tokens and documents up first, so that few plans serve all lengths.

Source: `transformer_engine.pytorch.DotProductAttention` of 2.9 to 2.20.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vlm_kernels.device import compute_capability
from vlm_kernels.span_attention.spans import Spans

LARGEST_HEAD_DIM = 256  # of flash-attn 2 and 3, and of cuDNN in training
DTYPES = (torch.bfloat16, torch.float16)

# (head dim, compute capability) for which stage `transformer_engine` of `make gpu` has passed on such a GPU, and was
# not behind FlexAttention. Adding a pair lets `auto` take Transformer Engine there.
PROVEN: frozenset[tuple[int, tuple[int, int]]] = frozenset()


@cache
def why_absent() -> str | None:
    """Return why Transformer Engine's attention cannot be imported; None where it can."""
    try:
        _attention_class()
    except ImportError as error:
        return " ".join(str(error).split())
    return None


def has_head_size(head_dim: int) -> bool:
    """Return whether there are kernels for heads of this size, on some GPU."""
    return head_dim <= LARGEST_HEAD_DIM and head_dim % 8 == 0


def takes(q: torch.Tensor, spans: Spans, window: int | None) -> bool:
    """Return whether Transformer Engine computes attention of queries [B, N, Sq, D] over these spans."""
    documents = spans.documents
    if spans.backend == "flex" or documents is None or not has_head_size(q.shape[-1]) or q.dtype not in DTYPES:
        return False
    if documents.seen == "range" or (documents.seen == "all" and window is not None):
        return False
    if spans.backend == "transformer_engine":
        return True
    return (q.shape[-1], compute_capability(q)) in PROVEN and why_absent() is None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Compute `span_attention` by Transformer Engine.

    Raises:
        RuntimeError: it has no fused kernel for this on this GPU.
    """
    assert spans.documents is not None
    batch, heads, _, head_dim = q.shape
    longest = -(-max(spans.documents.lengths) // 64) * 64  # as it would round the device's own maximum
    is_causal = spans.documents.seen == "past"
    tokens = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))  # [B * S, heads, D]
    try:
        attended = _attention(heads, k.shape[1], head_dim, scale)(
            *tokens,
            qkv_format="thd",
            cu_seqlens_q=spans.cu_seqlens,
            cu_seqlens_kv=spans.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal" if is_causal else "padding",
            # Numbers of keys before and behind the query, itself not counted; -1 is unlimited.
            window_size=(-1 if window is None else window - 1, 0 if is_causal else -1),
        )
    except ValueError as error:
        raise RuntimeError(
            f"Transformer Engine has no fused attention for {heads} query heads, {k.shape[1]} key heads of {head_dim} "
            f"in {q.dtype} on this GPU ({error}); use FlexAttention instead (attention_backend: flex)"
        ) from error
    return attended.view(batch, -1, heads, head_dim).transpose(1, 2)


@cache
def _attention(heads: int, key_heads: int, head_dim: int, scale: float) -> Callable[..., torch.Tensor]:
    """Return the module for heads of this rank; it holds no parameters and serves every layer with such heads."""
    # Otherwise it would compute by dense scores, without a word, where neither cuDNN nor flash-attn can.
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    module: Callable[..., torch.Tensor] = _attention_class()(
        num_attention_heads=heads, kv_channels=head_dim, num_gqa_groups=key_heads, softmax_scale=scale
    )
    return module


def _attention_class() -> Any:
    from transformer_engine.pytorch import DotProductAttention  # takes seconds, and only some clusters have it

    return DotProductAttention
