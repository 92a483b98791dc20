"""Which tokens of a row each context rank has: blocks of neighbouring tokens, dealt by the load of their spans.

Keys and values are gathered over context ranks, so every assignment of tokens to ranks gives the same result, and ranks
are free to share attention evenly. All of them compute the same assignment from values that all know. Equal ranges of
a row are far from even: tokens at the start of a document see few keys, and those of an image see ahead.

Shapes: S tokens of a row, padded; C context ranks.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

_LARGEST_BLOCK = 1024  # tokens
# Attention visits queries and keys in blocks of about this many tokens: queries of smaller blocks share a visit of keys
# that only some of them see.
_KERNEL_BLOCK = 128
# With fewer blocks than this per rank, loads are uneven and rows are padded by more than an eighth: short rows get
# smaller blocks.
_BLOCKS_PER_RANK = 8
_EVEN_ENOUGH = 1.03  # largest load of a rank divided by the mean


def padded_length(length: int, num_ranks: int, multiple_of: int = 1) -> int:
    """Return the number of tokens to which a row is padded so that blocks of it can be dealt in equal numbers.

    Args:
        length: tokens of the row.
        num_ranks: context ranks.
        multiple_of: what the tokens of each rank have to be a multiple of, the tensor size under sequence parallelism.
    """
    step = num_ranks * math.lcm(_smallest_block(-(-length // num_ranks)), multiple_of)
    return -(-length // step) * step


def planned_positions(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return the tokens of every context rank, [C, S / C] int64, ascending for each rank.

    Blocks are the largest whose loads can be dealt evenly, or else those that can be dealt most evenly. The larger they
    are, the fewer keys does a rank need for a layer with a window, and the fewer blocks do attention's kernels visit.

    Args:
        load: [S], attention's work for each token, such as the number of keys that it sees. Whole numbers, in any
            dtype: sums of them are exact on every machine. S is a multiple of `num_ranks`.
        num_ranks: context ranks.
    """
    assert len(load) % num_ranks == 0, "as many tokens for every rank"
    load, plans = load.astype(np.float64), list[tuple[float, np.ndarray]]()
    for block in _block_sizes(len(load) // num_ranks):
        positions = plan_blocks(load, num_ranks, block)
        imbalance = largest_to_mean(load[positions].sum(1))
        if imbalance <= _EVEN_ENOUGH:
            return positions
        plans.append((imbalance, positions))
    return min(plans, key=lambda plan: plan[0])[1]


def plan_blocks(load: np.ndarray, num_ranks: int, block: int) -> np.ndarray:
    """Deal blocks of `block` tokens to context ranks, as many to each, and return their tokens as `planned_positions`.

    The block with the greatest load goes first, each to the rank with the least load so far that has fewer than its
    number of blocks.
    """
    loads = load.reshape(-1, block).sum(1, dtype=np.float64)
    assert len(loads) % num_ranks == 0, "as many blocks for every rank"
    assigned = [list[int]() for _ in range(num_ranks)]
    ranks = [(0.0, rank) for rank in range(num_ranks)]
    for index in np.argsort(-loads, kind="stable").tolist():
        total, rank = heapq.heappop(ranks)
        assigned[rank].append(index)
        if len(assigned[rank]) < len(loads) // num_ranks:
            heapq.heappush(ranks, (total + loads[index].item(), rank))
    starts = np.sort(np.array(assigned), axis=1) * block
    return (starts[:, :, None] + np.arange(block)).reshape(num_ranks, -1)


def largest_to_mean(loads: np.ndarray) -> float:
    """Return the largest of the ranks' loads [C] divided by their mean: 1 is an even share."""
    return float(loads.max() / loads.mean())


def _block_sizes(shard: int) -> list[int]:
    """Sizes of blocks that divide a rank's number of tokens, the largest first; at least one."""
    powers = [1 << exponent for exponent in range(_LARGEST_BLOCK.bit_length()) if shard % (1 << exponent) == 0]
    smallest = min(_smallest_block(shard), powers[-1])
    return [size for size in reversed(powers) if size >= smallest]


def _smallest_block(shard: int) -> int:
    """The smallest block to try for a rank's number of tokens: that of the kernels if there are enough of them."""
    largest = max(1, min(_KERNEL_BLOCK, shard // _BLOCKS_PER_RANK))
    return 1 << (largest.bit_length() - 1)
