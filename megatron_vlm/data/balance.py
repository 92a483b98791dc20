"""Which data rank takes which packs of a global batch: equally many each, with predicted costs as equal as can be.

A step lasts as long as its slowest data rank. Packs have about the same number of tokens, but those of images and of
long documents cost more. The assignment depends on nothing but the packs and their costs, which are integers, so it is
the same on every rank and in every worker; it changes in which order gradients are summed, and nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenCosts:
    """What a row of the data costs, from its lengths, in FLOPs or any other unit.

    Attributes:
        token: of each token, attention left out.
        pair: of each pair of a token and a key that it sees, by the window of the layers that have it (None: all
            before it). What image tokens see ahead is left out.
        patch: of each patch of a tower.
        patch_pair: of each pair of patches of one image or frame.
        audio_frame: of each frame of audio.
    """

    token: int
    pair: tuple[tuple[int | None, int], ...]
    patch: int
    patch_pair: int
    audio_frame: int

    def of(
        self, tokens: np.ndarray, patches: np.ndarray, patch_pairs: np.ndarray, audio_frames: np.ndarray
    ) -> np.ndarray:
        """Return the cost of each row, given its lengths, all int64."""
        costs = self.token * tokens + self.patch * patches + self.patch_pair * patch_pairs
        costs = costs + self.audio_frame * audio_frames
        for window, cost in self.pair:
            seen = tokens if window is None else np.minimum(tokens, window)
            # Tokens at the start see fewer keys than the window.
            costs = costs + cost * (seen * (seen + 1) // 2 + (tokens - seen) * seen)
        return costs


@dataclass(frozen=True)
class Assignment:
    """The packs that each data rank takes.

    Attributes:
        packs: of each rank, the numbers of its packs in the global batch, in the order of its micro-batches.
        straggler_ratio: predicted cost of the rank with most over the mean; None where costs are not known.
        straggler_ratio_in_order: the same, had the ranks taken the packs in their order.
    """

    packs: list[list[int]]
    straggler_ratio: float | None = None
    straggler_ratio_in_order: float | None = None


def assign(global_batch_size: int, ranks: int, micro_batch_size: int, costs: np.ndarray | None) -> Assignment:
    """Assign the packs of a global batch to data ranks.

    Args:
        global_batch_size: how many packs.
        ranks: data ranks.
        micro_batch_size: packs of a micro-batch.
        costs: predicted cost of each pack, int64; None, like a single rank, leaves them in their order.
    """
    in_order = packs_in_order(global_batch_size, ranks, micro_batch_size)
    if costs is None or ranks == 1:
        return Assignment(in_order)
    balanced = _longest_first(costs, ranks)
    ratio, ratio_in_order = straggler_ratio(costs, balanced), straggler_ratio(costs, in_order)
    if ratio < ratio_in_order:
        return Assignment(balanced, ratio, ratio_in_order)
    return Assignment(in_order, ratio_in_order, ratio_in_order)


def packs_in_order(global_batch_size: int, ranks: int, micro_batch_size: int) -> list[list[int]]:
    """Return the packs of each rank where the ranks take micro-batches in turn."""
    numbers = np.arange(global_batch_size).reshape(-1, ranks, micro_batch_size)
    return numbers.swapaxes(0, 1).reshape(ranks, -1).tolist()


def straggler_ratio(costs: np.ndarray, packs: Sequence[Sequence[int]]) -> float:
    """Return the cost of the rank with most over the mean."""
    of_ranks = [sum(costs[own].tolist()) for own in packs]
    return max(of_ranks) * len(of_ranks) / sum(of_ranks) if any(of_ranks) else 1.0


def _longest_first(costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Give each pack, the costliest first, to the rank with the least so far of those that take more.

    Source: longest processing time first (Graham 1969), here with equally many packs per rank. Micro-batches descend in
    cost on every rank, so that ranks which wait for each other in every layer (expert parallelism) wait least.
    """
    packs: list[list[int]] = [[] for _ in range(ranks)]
    takers = [(0, rank) for rank in range(ranks)]  # those that take more, by what they have, as a heap
    for pack in np.argsort(-costs, kind="stable").tolist():
        cost, rank = takers[0]
        packs[rank].append(pack)
        if len(packs[rank]) * ranks < len(costs):
            heapq.heapreplace(takers, (cost + int(costs[pack]), rank))
        else:
            heapq.heappop(takers)
    return packs
