"""Tables of blocks that span attention visits: exact, small, and close to the least for packed rows.

FlexAttention on the host does not read its block lists, so they are compared with torch's own here.
Shapes: B batch, Sq queries, Sk keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.context_balance import document_lengths, seen_keys
from megatron_vlm.data.context_blocks import planned_positions
from tests.kernels.span_rows import needed_keys, packed_spans, rank_spans, shard_of
from vlm_kernels.span_attention import QueryShard, Spans
from vlm_kernels.span_attention.blocks import Blocks
from vlm_kernels.span_attention.spans import _visible

MIB = 2**20


def random_spans(order: str, num_queries: int, num_keys: int, seed: int = 0) -> Spans:
    """Bounds that grow with the query, that do not, or that leave a third of queries without a key."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, num_keys, (2, 3, -(-num_queries // 50)), generator=generator, dtype=torch.int32)
    if order != "none":
        bounds = bounds.sort(0).values
    if order == "ascending":
        bounds = bounds.sort(2).values
    low, high = bounds.repeat_interleave(50, 2)[..., :num_queries]
    positions = torch.arange(num_queries, dtype=torch.int32).repeat(3, 1)
    return Spans(low.contiguous(), high.contiguous(), QueryShard(positions, num_keys))


CASES: dict[str, Callable[[], Spans]] = {
    "packed": lambda: packed_spans(640),
    "planned blocks of 128 tokens": lambda: rank_spans(packed_spans(1024), 128, 2),
    "planned blocks of 32 tokens": lambda: rank_spans(packed_spans(1024), 32, 2),
    "needed keys": lambda: needed_keys(rank_spans(packed_spans(1536), 128, 4, 100), 100, 128)[0],
    "ascending": lambda: random_spans("ascending", 512, 640),
    "scattered": lambda: random_spans("scattered", 512, 640),
    "some see nothing": lambda: random_spans("none", 512, 640),
}


@pytest.mark.parametrize("case", CASES)
def test_block_lists_are_torchs(case: str) -> None:
    """Numbers and indices of partial and of full blocks, by query and by key, as torch makes them of every pair."""
    spans = CASES[case]()
    batch, num_queries = spans.low.shape
    assert num_queries % 128 == spans.num_keys % 128 == 0
    ours = spans.block_mask(None)
    theirs = create_block_mask(
        _visible(spans.low, spans.high), batch, 1, num_queries, spans.num_keys, device="cpu", BLOCK_SIZE=128
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(theirs, f"{name}_num_blocks")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), numbers), name
        is_listed = torch.arange(getattr(theirs, f"{name}_indices").shape[-1]) < numbers[..., None]
        found, expected = (getattr(mask, f"{name}_indices")[is_listed] for mask in (ours, theirs))
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("order", ["ascending", "scattered", "none"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(300, 300), (1, 700), (700, 1), (127, 129), (384, 333)])
def test_block_lists_of_lengths_that_blocks_do_not_divide(order: str, num_queries: int, num_keys: int) -> None:
    """From the dense mask: a block with missing queries or keys is listed as partial if any pair of it is visible."""
    for seed in range(4):
        spans = random_spans(order, num_queries, num_keys, seed)
        mask = spans.block_mask(None)
        for row, visible in enumerate(spans.dense(None)[:, 0]):
            tiles = [tile.split(128, dim=1) for tile in visible.split(128, dim=0)]
            for block, row_tiles in enumerate(tiles):
                touched = [key for key, tile in enumerate(row_tiles) if tile.any()]
                full = [key for key in touched if row_tiles[key].sum() == 128 * 128]
                listed = [
                    indices[row, 0, block, : numbers[row, 0, block]].tolist()
                    for numbers, indices in (
                        (mask.kv_num_blocks, mask.kv_indices),
                        (mask.full_kv_num_blocks, mask.full_kv_indices),
                    )
                ]
                assert listed == [[key for key in touched if key not in full], full]


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return outputs


def document_row(length: int, median: int) -> Spans:
    """One row of documents of lognormal lengths."""
    lengths = document_lengths(np.random.default_rng(0), median, length)
    low, high = (torch.from_numpy(bound).int()[None] for bound in seen_keys(lengths, (0, 1), window=None))
    return Spans(low, high)


def test_tables_of_a_long_row_are_small() -> None:
    """At 131,072 tokens: no tensor of all queries and blocks of keys, which would have 128 MiB as booleans."""
    spans = document_row(131_072, 1024)
    with LargestTensor() as largest:
        mask = spans.block_mask(1024)
        tables = [spans.block_ranges(1024, Blocks(*sizes, 8, 2)) for sizes in ((128, 128), (128, 64), (64, 64))]
    kept = [
        sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))
        for tensors in (mask.as_tuple(), *((table.by_query, table.by_key) for table in tables))
    ]
    # FlexAttention's four lists of 1,024 x 1,024 blocks; ours have two rows of four numbers for each block.
    assert kept[0] < 17 * MIB and max(kept[1:]) <= 2 * 4 * 4 * 2048
    # The table of 2,048 x 2,049 blocks of 64 tokens, int32.
    assert largest.num_bytes < 17 * MIB


def visits(spans: Spans, window: int | None) -> tuple[int, int, int]:
    """Pairs of blocks of 128 tokens that FlexAttention lists, and that our kernels visit by query and by key."""
    mask, ranges = spans.block_mask(window), spans.block_ranges(window, Blocks(128, 128, 8, 2))
    listed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    by_query, by_key = (int((table[..., 3] - table[..., 0]).sum()) for table in (ranges.by_query, ranges.by_key))
    return listed, by_query, by_key


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("median", [4096, 1024, 300])
def test_packed_rows_visit_no_needless_block(median: int, window: int | None) -> None:
    """Nor do all ranks together: FlexAttention's lists are exact, and the blocks in them are neighbours."""
    row = document_row(32_768, median)
    listed, by_query, by_key = visits(row, window)
    assert listed == by_query == by_key
    load = (row.high - row.low + 1)[0].numpy()
    shards = [shard_of(row, torch.from_numpy(positions).int()[None]) for positions in planned_positions(load, 8)]
    of_ranks = [visits(shard, window) for shard in shards]
    of_ranks += [visits(needed_keys(shard, window, 128)[0], None) for shard in shards]
    assert all(len(set(counts)) == 1 for counts in of_ranks)
    assert sum(counts[0] for counts in of_ranks) == 2 * listed
    pairs = int((row.high - row.first_key(window) + 1).sum())
    print(f"\ndocuments around {median}, window {window}: {listed} blocks for {pairs / 128**2:.0f} blocks of pairs")
