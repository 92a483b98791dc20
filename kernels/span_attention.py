"""Attention from spans: every query sees a range of keys, cut by its layer's window on the past side.

Key k is visible to query q iff `low[q] <= k <= high[q]` and `q - k < window`. With `low` the start of the document and
`high` the query itself this is causal attention; `high` at the end of an image makes the image bidirectional.

Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_vlm import platform

_BLOCK = 128


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
        """Block-sparse form of `dense`, built from a table of [B, S, S / 128]; nothing of size [S, S] exists."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.low, self.high, window)
        return self._block_masks[window]

    @cached_property
    def all_causal(self) -> bool:
        """Whether every query sees all keys up to itself; the host waits for the answer."""
        place = torch.arange(self.low.shape[1], device=self.low.device)
        return bool((self.low == 0).all() & (self.high == place).all())

    def dense(self, window: int | None) -> torch.Tensor:
        """[B, 1, S, S] bool, true where the key is visible."""
        place = torch.arange(self.low.shape[1], device=self.low.device)
        visible = (place >= self.low[..., None]) & (place <= self.high[..., None])
        if window is not None:
            visible &= place[:, None] - place < window
        return visible.unsqueeze(1)


def _block_mask(low: torch.Tensor, high: torch.Tensor, window: int | None) -> BlockMask:
    """Blocks of keys that some query of a block of queries sees, split into those that all of them see whole."""
    length = low.shape[1]
    num_blocks = -(-length // _BLOCK)
    query = torch.arange(length, device=low.device)
    oldest = low if window is None else torch.maximum(low, query - window + 1)
    first_key = torch.arange(num_blocks, device=low.device) * _BLOCK
    last_key = first_key + _BLOCK - 1
    touched = (oldest[..., None] <= last_key) & (high[..., None] >= first_key)
    covered = (oldest[..., None] <= first_key) & (high[..., None] >= last_key)
    # Queries past the end see nothing, so that their block is masked like one that some query sees in part.
    missing = num_blocks * _BLOCK - length
    touched, covered = (
        torch.nn.functional.pad(blocks, (0, 0, 0, missing)).unflatten(1, (num_blocks, _BLOCK))
        for blocks in (touched, covered)
    )
    touched, covered = touched.any(2), covered.all(2)
    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~covered),
        *_block_lists(covered),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(low, high, window),
        seq_lengths=(length, length),
    )


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices of the blocks that are set, [B, 1, blocks] and [B, 1, blocks, blocks]; the rest follows."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


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
    """`span_attention` by a dense mask, which lives for this call only, or where it is causal without one."""
    if (window is None or window >= q.shape[2]) and spans.all_causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return scaled_dot_product_attention(q, k, v, attn_mask=spans.dense(window), scale=scale, enable_gqa=True)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    return _compiled_flex_attention()(q, k, v, block_mask=spans.block_mask(window), scale=scale, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # A variant is compiled per window, gradient mode and rough length; past dynamo's limit of 8 it would silently run
    # uncompiled, over dense scores.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
