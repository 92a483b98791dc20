"""Packed rows and what a context rank sees of them, for tests of span attention.

Shapes: B batch, Sq queries, Sk keys.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from megatron_vlm.data.context_blocks import plan_blocks
from vlm_kernels.span_attention import QueryShard, Spans

# Documents of a row of 600 tokens: some of one token, one over several blocks of keys, and padding after the last.
DOCUMENTS = (1, 130, 1, 1, 37, 250, 64, 90, 1)
# First token and tokens of images: across borders of blocks of 16 to 128 tokens, and as long as a document.
IMAGES = ((100, 30), (168, 1), (180, 90), (420, 64))

# Queries, keys, rows and documents of a row, as packed runs and context ranks have them, one after the other.
RUN_SHAPES = (
    *((512, 512, 1, 5), (500, 500, 1, 1), (389, 389, 1, 9), (384, 384, 2, 3), (320, 320, 4, 6)),
    *((192, 768, 1, 5), (150, 600, 1, 3), (160, 640, 2, 4)),  # the keys of all ranks
    *((192, 384, 1, 2), (192, 200, 1, 7), (256, 256, 1, 3), (192, 700, 2, 8), (160, 333, 2, 1), (256, 257, 3, 2)),
)


def run_spans(queries: int, keys: int, rows: int, documents: int) -> Spans:
    """Causal spans of evenly spaced queries of documents of equal length; bounds begin anywhere in memory."""
    place = torch.arange(-documents, queries, dtype=torch.int32) * (keys // queries)
    high = place.repeat(rows, 1)[:, documents:]
    size = keys // documents
    low = (place // size * size).repeat(rows, 1)[:, documents:]
    return Spans(low, high, None if queries == keys and rows < 2 else QueryShard(high, keys))


def packed_spans(length: int = 600) -> Spans:
    """Two rows: the documents, whose images see ahead, and the same ones from the last to the first without images.

    Of a shorter or longer row, each document and image has its part. Padding sees itself.
    """
    place = torch.arange(length, dtype=torch.int32)
    low, high = place.repeat(2, 1), place.repeat(2, 1)
    for row, documents in enumerate((DOCUMENTS, DOCUMENTS[::-1])):
        borders = [round(end * length / 600) for end in accumulate(documents, initial=0)]
        for begin, end in pairwise(borders):
            low[row, begin:end] = begin
    for first, tokens in IMAGES:
        begin, end = round(first * length / 600), round((first + tokens) * length / 600)
        high[0, begin:end] = end - 1
    return Spans(low, high)


def rank_spans(whole: Spans, block: int, ranks: int, window: int | None = None) -> Spans:
    """The spans of the last context rank's queries, of which each row has planned blocks; the row's end is cut off."""
    length = whole.low.shape[1] // (block * ranks) * (block * ranks)
    load = (whole.high - whole.first_key(window) + 1)[:, :length].numpy()
    planned = [torch.from_numpy(plan_blocks(row, ranks, block)[-1]).int() for row in load]
    return shard_of(whole, torch.stack(planned))


def shard_of(whole: Spans, positions: torch.Tensor) -> Spans:
    """The spans of the queries at `positions` [B, Sq] alone."""
    low, high = (bound.gather(1, positions.long()) for bound in (whole.low, whole.high))
    return Spans(low, high, QueryShard(positions, whole.num_keys))


def needed_keys(shard: Spans, window: int | None, block: int) -> tuple[Spans, torch.Tensor]:
    """The spans over the blocks of keys that a query of any row sees within the window, and those keys [Sk].

    No window is left to apply: the first key of each query is the window's.
    """
    first, last = shard.first_key(window), shard.high
    starts = torch.arange(0, shard.num_keys, block)
    is_seen = (first[..., None] < starts + block) & (last[..., None] >= starts) & (first <= last)[..., None]
    is_needed = is_seen.flatten(0, 1).any(0).repeat_interleave(block)[: shard.num_keys]
    index = is_needed.cumsum(0, dtype=torch.int32) - 1
    assert shard.shard is not None
    positions = index[shard.shard.positions.long()]
    low, high = index[first.long()], index[last.long()]
    return Spans(low, high, QueryShard(positions, int(is_needed.sum()))), is_needed.nonzero().squeeze(1)
