"""Visible key ranges of a micro-batch, and the tables of blocks that attention makes of them, once for all layers.

Key k is visible to query q iff `low[q] <= k <= high[q]` and `q - k < window`. With `low` the start of the document and
`high` the query itself this is causal attention; `high` at the end of an image makes the image bidirectional.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from vlm_kernels.span_attention.blocks import Blocks

_BLOCK = 128  # of FlexAttention's masks


@dataclass(frozen=True)
class BlockRanges:
    """Which blocks of one kind a block of the other visits: [first, end), of which [whole, whole end) need no mask.

    Attributes:
        by_query: [B, blocks of queries, 4] int32 (first, whole, whole end, end), blocks of keys.
        by_key: [B, blocks of keys, 4] int32, the same of blocks of queries.
    """

    by_query: torch.Tensor
    by_key: torch.Tensor


@dataclass
class Spans:
    """Visible key ranges of one micro-batch, and tables built from them, one per distinct window and block size.

    Attributes:
        low: [B, S] int32, first visible key.
        high: [B, S] int32, last visible key.
    """

    low: torch.Tensor
    high: torch.Tensor
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)
    _first_keys: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _block_ranges: dict[tuple[int | None, int, int], BlockRanges] = field(default_factory=dict, repr=False)

    def block_mask(self, window: int | None) -> BlockMask:
        """Block-sparse form of `dense`, built from a table of [B, S, S / 128]; nothing of size [S, S] exists."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.first_key(window), self.high)
        return self._block_masks[window]

    def first_key(self, window: int | None) -> torch.Tensor:
        """[B, S] int32, first key that is visible within the window; `high` is the last."""
        if window is None:
            return self.low
        if window not in self._first_keys:
            query = torch.arange(self.low.shape[1], device=self.low.device, dtype=torch.int32)
            self._first_keys[window] = torch.maximum(self.low, query - window + 1)
        return self._first_keys[window]

    def block_ranges(self, window: int | None, blocks: Blocks) -> BlockRanges:
        """Ranges of blocks of a launch's sizes, from a table of [B, blocks of queries, blocks of keys]."""
        key = (window, blocks.queries, blocks.keys)
        if key not in self._block_ranges:
            self._block_ranges[key] = _block_ranges(self.first_key(window), self.high, blocks.queries, blocks.keys)
        return self._block_ranges[key]

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


def _block_ranges(first: torch.Tensor, last: torch.Tensor, queries: int, keys: int) -> BlockRanges:
    """Ranges from the first and last visible key [B, S] of every query; the host waits for nothing."""
    length = first.shape[1]
    missing = -length % queries

    def blocks(values: torch.Tensor, past_the_end: int) -> torch.Tensor:
        return pad(values, (0, missing), value=past_the_end).unflatten(1, (-1, queries))

    sees_any = first <= last
    lowest = blocks(first.where(sees_any, length), length).amin(2)
    highest = blocks(last.where(sees_any, -1), -1).amax(2)
    # What every query of the block sees, a single query that sees nothing leaving nothing.
    latest_first = blocks(first, 0).amax(2)
    earliest_last = blocks(last, length).amin(2)
    begin = lowest.div(keys, rounding_mode="floor")
    end = torch.maximum(highest.div(keys, rounding_mode="floor") + 1, begin)
    whole = (latest_first + keys - 1).div(keys, rounding_mode="floor")
    whole_end = (earliest_last + 1).div(keys, rounding_mode="floor")
    nothing_whole = whole_end <= whole
    whole, whole_end = end.where(nothing_whole, whole), end.where(nothing_whole, whole_end)

    key_block = torch.arange(-(-length // keys), device=first.device, dtype=torch.int32)
    touched = (key_block >= begin[..., None]) & (key_block < end[..., None])
    covered = (key_block >= whole[..., None]) & (key_block < whole_end[..., None])
    return BlockRanges(
        torch.stack((begin, whole, whole_end, end), dim=-1).int().contiguous(), _key_block_ranges(touched, covered)
    )


def _key_block_ranges(touched: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """[B, key blocks, 4] int32, ranges of the set entries of [B, query blocks, key blocks].

    Blocks within the range that no query sees cost time only. `covered` blocks past the first run of them are masked.
    """
    count = touched.shape[1]
    query_block = torch.arange(count, device=touched.device, dtype=torch.int32)[:, None]
    end = (query_block + 1).where(touched, 0).amax(1)
    begin = torch.minimum(query_block.where(touched, count).amin(1), end)
    whole = query_block.where(covered, count).amin(1)
    whole_end = query_block.where(~covered & (query_block > whole[:, None]), count).amin(1)
    nothing_whole = whole == count
    whole, whole_end = end.where(nothing_whole, whole), end.where(nothing_whole, whole_end)
    return torch.stack((begin, whole, whole_end, end), dim=-1).int().contiguous()


def _block_mask(first: torch.Tensor, last: torch.Tensor) -> BlockMask:
    """Blocks of keys that some query of a block of queries sees, split into those that all of them see whole.

    Args:
        first: [B, S], first visible key of each query, its window included: a window of its own in the mask's function
            would be compiled again for each.
        last: [B, S], last visible key.
    """
    length = first.shape[1]
    num_blocks = -(-length // _BLOCK)
    first_key = torch.arange(num_blocks, device=first.device) * _BLOCK
    last_key = first_key + _BLOCK - 1
    touched = (first[..., None] <= last_key) & (last[..., None] >= first_key)
    covered = (first[..., None] <= first_key) & (last[..., None] >= last_key)
    # Queries past the end see nothing, so that their block is masked like one that some query sees in part.
    missing = num_blocks * _BLOCK - length
    touched, covered = (
        pad(blocks, (0, 0, 0, missing)).unflatten(1, (num_blocks, _BLOCK)) for blocks in (touched, covered)
    )
    touched, covered = touched.any(2), covered.all(2)
    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~covered),
        *_block_lists(covered),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(first, last),
        seq_lengths=(length, length),
    )


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices of the blocks that are set, [B, 1, blocks] and [B, 1, blocks, blocks]; the rest follows."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def _visible(first: torch.Tensor, last: torch.Tensor) -> Callable[..., torch.Tensor]:
    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[batch, query]) & (key <= last[batch, query])

    return visible
