"""Attention from spans: every query sees a range of keys, cut by its layer's window on the past side.

Key k is visible to query q iff `low[q] <= k <= high[q]` and `q - k < window`. With `low` the start of the document and
`high` the query itself this is causal attention; `high` at the end of an image makes the image bidirectional.

Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_vlm import platform


@dataclass
class Spans:
    """Visible key ranges of one micro-batch, and block masks built from them, one per distinct window.

    Attributes:
        low: [B, S] int32, first visible key.
        high: [B, S] int32, last visible key.
    """

    low: torch.Tensor
    high: torch.Tensor
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    def block_mask(self, window: int | None) -> BlockMask:
        """Block-sparse form of `dense`; holds a bit per 128 x 128 block, never [S, S]."""
        if window not in self._block_masks:
            batch, length = self.low.shape
            self._block_masks[window] = create_block_mask(
                _visible(self.low, self.high, window), batch, None, length, length, device=self.low.device
            )
        return self._block_masks[window]

    def dense(self, window: int | None) -> torch.Tensor:
        """[B, 1, S, S] bool, true where the key is visible."""
        place = torch.arange(self.low.shape[1], device=self.low.device)
        visible = (place >= self.low[..., None]) & (place <= self.high[..., None])
        if window is not None:
            visible &= place[:, None] - place < window
        return visible.unsqueeze(1)


def _visible(low: torch.Tensor, high: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        inside = (key >= low[batch, query]) & (key <= high[batch, query])
        return inside if window is None else inside & (query - key < window)

    return visible


def span_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Grouped-query attention over spans: FlexAttention where a GPU compiles it, the reference elsewhere.

    Args:
        q: [B, N, S, D].
        k: [B, G, S, D].
        v: [B, G, S, D].
        spans: visible ranges.
        window: keys visible on the past side, the query included; None is unlimited.
        scale: factor on the scores.

    Returns:
        [B, N, S, D].
    """
    return (_flex if platform.current().accelerated else reference)(q, k, v, spans, window, scale)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """`span_attention` by a dense mask, which lives for this call only."""
    return scaled_dot_product_attention(q, k, v, attn_mask=spans.dense(window), scale=scale, enable_gqa=True)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    return _compiled_flex_attention()(q, k, v, block_mask=spans.block_mask(window), scale=scale, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)
