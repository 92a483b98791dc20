"""Visible key ranges of a micro-batch, and the block tables that attention builds from them, once for all layers.

Key k is visible to query q iff `low[q] <= k <= high[q]` and `position[q] - k < window`, all of them indices in the
sequence of keys; a window may spare some keys (`kept`). With `low` the start of the document and `high` the query
itself this is causal attention; `high` at the end of an image makes the image bidirectional. Queries are that same
sequence, or any part of it in any order.

Shapes: B batch, Sq queries, Sk keys, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from vlm_kernels.span_attention.blocks import Blocks

_BLOCK = 128  # tokens per block of FlexAttention's masks

Backend = Literal["auto", "flex", "transformer_engine"]
"""What computes attention on a GPU: what is proven best there, FlexAttention, or Transformer Engine where it can."""


@dataclass(frozen=True)
class Documents:
    """What the host knows of spans: which queries share a document, and what they see of it.

    No query sees a key of another document. The padding of a row counts as a document of its own.

    Attributes:
        lengths: tokens of each document, in the order of tokens, row after row.
        seen: what a query sees of its document, but for windows: all keys up to itself (past), all keys (all), or any
            range of them (range).
    """

    lengths: tuple[int, ...]
    seen: Literal["past", "all", "range"]


@dataclass(frozen=True)
class BlockRanges:
    """Ranges of blocks that a block of queries or keys visits: [first, end), of which [full, full end) need no mask.

    Attributes:
        by_query: [B, blocks of queries, 4] int32, the range (first, full, full end, end) of blocks of keys.
        by_key: [B, blocks of keys, 4] int32, the same range of blocks of queries.
    """

    by_query: torch.Tensor
    by_key: torch.Tensor


Gathered = tuple[torch.Tensor, torch.Tensor, "Spans"]


@dataclass(frozen=True)
class QueryShard:
    """The positions of queries that are only a part of the sequence of keys, such as those of a context-parallel rank.

    Attributes:
        positions: [B, Sq] int32, index of each query in the sequence of keys, in any order. Blocks that attention
            visits are fewest where the queries of a block lie together and blocks ascend.
        num_keys: number of keys, Sk.
        block_starts: [B, Sq] int32, first token of each query's block, the run of tokens that see equally far, of which
            a part may lie in other shards; None where no layer needs it (`Spans.with_whole_blocks`).
        gather: takes the keys and values [Sq, B, G, D] of these tokens, spans, and a window; returns keys and values of
            all tokens that these queries see within the window, through which gradients flow, and their spans among
            those (`Spans.among`). Layers call it before `span_attention`; None where keys and values are complete.
    """

    positions: torch.Tensor
    num_keys: int
    block_starts: torch.Tensor | None = None
    gather: Callable[[torch.Tensor, torch.Tensor, Spans, int | None], Gathered] | None = None


@dataclass
class Spans:
    """Visible key ranges of one micro-batch, and tables built from them, one per distinct window and block size.

    Attributes:
        low: [B, Sq] int32, first visible key.
        high: [B, Sq] int32, last visible key.
        shard: positions of the queries in the sequence of keys; None where they are all of it, in order.
        kept: [B, Sq] int32, first key that no window hides from the query; None where windows hide all.
        documents: what the host knows of them; None where that is nothing, and where there is a shard.
        backend: what computes attention on a GPU.
    """

    low: torch.Tensor
    high: torch.Tensor
    shard: QueryShard | None = None
    kept: torch.Tensor | None = None
    documents: Documents | None = None
    backend: Backend = "auto"
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)
    _first_keys: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _block_ranges: dict[tuple[int | None, int, int], BlockRanges] = field(default_factory=dict, repr=False)
    _among: dict[int | None, Spans] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.shard is not None:
            assert self.shard.positions.shape == self.low.shape, "a position for every query"
            # Wider positions would widen the first visible keys, which kernels read from memory as int32.
            assert self.shard.positions.dtype == self.low.dtype, "positions of the bounds' dtype"
            assert self.documents is None, "documents are those of all queries"

    @property
    def num_keys(self) -> int:
        """Number of keys, Sk."""
        return self.low.shape[1] if self.shard is None else self.shard.num_keys

    @property
    def query_positions(self) -> torch.Tensor:
        """Index of each query in the sequence of keys, [Sq] or [B, Sq] int32."""
        if self.shard is not None:
            return self.shard.positions
        return torch.arange(self.low.shape[1], device=self.low.device, dtype=torch.int32)

    def causal(self) -> Spans:
        """Return spans of the same documents in which no query sees a later key."""
        high = self.query_positions.expand_as(self.low).contiguous()
        documents = self.documents and replace(self.documents, seen="past")
        return Spans(self.low, high, self.shard, documents=documents, backend=self.backend)

    def with_whole_blocks(self) -> Spans:
        """Return spans in which windows hide nothing of a query's block, the run of queries that see equally far."""
        if self.shard is not None:
            assert self.shard.block_starts is not None, "a block may lie in several shards"
            return Spans(self.low, self.high, self.shard, kept=self.shard.block_starts, backend=self.backend)
        # Where all see only the past, blocks are single tokens, and the documents are still all that there is to know.
        kept = block_starts(self.high)
        return Spans(self.low, self.high, kept=kept, documents=self.documents, backend=self.backend)

    def among(self, window: int | None, places: torch.Tensor, num_keys: int) -> Spans:
        """Return the spans within a window over some of the keys, which are all that the queries see within it.

        Args:
            window: number of keys visible on the past side, the query included; None is unlimited.
            places: [Sk] int32, the place of each key among them, ascending.
            num_keys: number of them.
        """
        if window not in self._among:
            assert self.shard is not None, "without a shard, all keys are there"
            low, high = places[self.first_key(window)], places[self.high]
            shard = QueryShard(self.shard.positions, num_keys)
            self._among[window] = Spans(low, high, shard, backend=self.backend)
        return self._among[window]

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the block-sparse form of `dense`, built from tables of [B, Sq / 128, Sk / 128]."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.first_key(window), self.high, self.num_keys)
        return self._block_masks[window]

    def first_key(self, window: int | None) -> torch.Tensor:
        """Return the first key that is visible within the window, [B, Sq] int32; `high` is the last."""
        if window is None:
            return self.low
        if window not in self._first_keys:
            first = self.query_positions - window + 1
            if self.kept is not None:
                first = torch.minimum(first, self.kept)
            self._first_keys[window] = torch.maximum(self.low, first)
        return self._first_keys[window]

    def block_ranges(self, window: int | None, blocks: Blocks) -> BlockRanges:
        """Return the ranges of blocks of a launch's sizes, from tables of [B, blocks of queries, blocks of keys]."""
        key = (window, blocks.queries, blocks.keys)
        if key not in self._block_ranges:
            self._block_ranges[key] = _block_ranges(
                self.first_key(window), self.high, self.num_keys, blocks.queries, blocks.keys
            )
        return self._block_ranges[key]

    @cached_property
    def all_causal(self) -> bool:
        """Whether queries are the full sequence and each sees all keys up to itself; the host waits for the device."""
        return self.shard is None and bool((self.low == 0).all() & (self.high == self.query_positions).all())

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Where documents begin among the tokens of all rows, and the number of these, [documents + 1] int32."""
        assert self.documents is not None
        begins = torch.tensor((0, *accumulate(self.documents.lengths)), dtype=torch.int32)
        return begins.to(self.low.device, non_blocking=True)  # the host does not wait for the device

    def dense(self, window: int | None) -> torch.Tensor:
        """Return the dense mask [B, 1, Sq, Sk] bool, true where the key is visible."""
        key = torch.arange(self.num_keys, device=self.low.device)
        visible = (key >= self.first_key(window)[..., None]) & (key <= self.high[..., None])
        return visible.unsqueeze(1)


def block_starts(high: torch.Tensor) -> torch.Tensor:
    """Return the first token of each token's block, the run of tokens that see equally far, from [B, S] int32."""
    begins = torch.ones_like(high, dtype=torch.bool)
    begins[:, 1:] = high[:, 1:] != high[:, :-1]
    positions = torch.arange(high.shape[1], device=high.device, dtype=torch.int32)
    return torch.where(begins, positions, 0).cummax(1).values


def _block_ranges(first: torch.Tensor, last: torch.Tensor, num_keys: int, queries: int, keys: int) -> BlockRanges:
    touched, covered = _tiles(first, last, num_keys, queries, keys)
    return BlockRanges(_ranges(touched, covered), _ranges(touched.mT, covered.mT))


def _tiles(
    first: torch.Tensor, last: torch.Tensor, num_keys: int, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of keys some query of a block of queries sees, and which blocks all of them see as a whole.

    A query sees one range of blocks: counting where ranges begin and end takes no table of queries and blocks. The host
    does not wait for the device.

    Args:
        first: [B, Sq], first visible key of each query, the window included; past `last` where it sees none.
        last: [B, Sq], last visible key.
        num_keys: number of keys, Sk. A last block with fewer than `keys` of them is never seen as a whole.
        queries: queries per block; the last one may have fewer.
        keys: keys per block.

    Returns:
        Two masks [B, blocks of queries, blocks of keys].
    """
    num_queries, num_blocks = first.shape[1], -(-num_keys // keys)
    missing = -num_queries % queries
    first, last = (
        pad(values, (0, missing), value=unseen).unflatten(1, (-1, queries))
        for values, unseen in ((first, num_keys), (last, -1))
    )
    begin, whole = (values.div(keys, rounding_mode="floor") for values in (first, first + keys - 1))
    end, whole_end = (values.div(keys, rounding_mode="floor") for values in (last + keys, last + 1))
    seeing = _count_in_ranges(begin, end.where(first <= last, begin), num_blocks)
    seeing_whole = _count_in_ranges(whole, torch.maximum(whole, whole_end), num_blocks)
    size = num_queries - torch.arange(0, num_queries, queries, device=first.device)
    return seeing > 0, seeing_whole == size.clamp(max=queries)[:, None]


def _count_in_ranges(begin: torch.Tensor, end: torch.Tensor, count: int) -> torch.Tensor:
    """Count for each of `count` indices the ranges [begin, end), both [B, blocks, ranges], that have it."""
    change, one = begin.new_zeros((*begin.shape[:2], count + 1)), torch.ones_like(begin)
    change.scatter_add_(2, begin.long(), one).scatter_add_(2, end.long(), -one)
    return change.cumsum(2, dtype=change.dtype)[..., :count]


def _ranges(touched: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """Ranges [B, rows, 4] int32 of the set entries in the rows of masks [B, rows, columns].

    Blocks within a range that are not touched cost time only. `covered` blocks past the first run of them are masked.
    """
    count = touched.shape[2]
    column = torch.arange(count, device=touched.device, dtype=torch.int32)
    end = (column + 1).where(touched, 0).amax(2)
    begin = torch.minimum(column.where(touched, count).amin(2), end)
    whole = column.where(covered, count).amin(2)
    whole_end = column.where(~covered & (column > whole[..., None]), count).amin(2)
    nothing_whole = whole == count
    whole, whole_end = end.where(nothing_whole, whole), end.where(nothing_whole, whole_end)
    return torch.stack((begin, whole, whole_end, end), dim=-1).int().contiguous()


def _block_mask(first: torch.Tensor, last: torch.Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's mask: partial blocks, of which some query sees some keys, and full blocks, which need no mask.

    `first` and `last` are those of `_tiles`: a window in the mask's function would be compiled again for each.
    """
    num_queries = first.shape[1]
    touched, covered = _tiles(first, last, num_keys, _BLOCK, _BLOCK)
    if num_queries % _BLOCK:
        covered[:, -1] = False  # queries past the end see nothing
    # Attention would be compiled again for tensors that are parts of others, or begin elsewhere in them.
    first, last = (bound.clone(memory_format=torch.contiguous_format) for bound in (first, last))
    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~covered),
        *_block_lists(covered),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(first, last),
        seq_lengths=(num_queries, num_keys),
    )


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [B, 1, query blocks] and indices [B, 1, query blocks, key blocks] of set blocks, the unset ones last."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def _visible(first: torch.Tensor, last: torch.Tensor) -> Callable[..., torch.Tensor]:
    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[batch, query]) & (key <= last[batch, query])

    return visible
