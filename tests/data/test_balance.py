"""Which data rank takes which packs of a global batch."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.balance import TokenCosts, assign, packs_in_order


@pytest.mark.parametrize(("ranks", "size"), [(1, 4), (2, 2), (4, 1), (2, 1), (8, 2)])
@pytest.mark.parametrize("known", [False, True])
def test_ranks_share_a_global_batch_without_overlap(ranks: int, size: int, known: bool) -> None:
    costs = np.random.default_rng(0).integers(1, 1000, 16) if known else None
    packs = assign(16, ranks, size, costs).packs
    assert [len(mine) for mine in packs] == [16 // ranks] * ranks
    assert sorted(pack for mine in packs for pack in mine) == list(range(16))


def test_without_costs_ranks_take_micro_batches_in_turn() -> None:
    assert packs_in_order(8, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert assign(8, 2, 2, None).packs == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert assign(8, 1, 2, np.arange(8)).packs == [list(range(8))]


def test_an_image_heavy_pack_per_rank() -> None:
    """Every fourth pack costs ten times as much; in order they all come to one rank of four."""
    costs = np.array([100, 10, 10, 10] * 4)
    found = assign(16, 4, 1, costs)
    assert found.straggler_ratio_in_order == pytest.approx(400 / 130)
    assert found.straggler_ratio == 1
    assert all(sum(pack % 4 == 0 for pack in mine) == 1 for mine in found.packs)


def test_random_costs_become_even() -> None:
    """Of eight ranks with eight packs each; equal counts, and never worse than in order."""
    generator = np.random.default_rng(1)
    ratios = []
    for _ in range(50):
        found = assign(64, 8, 2, np.exp(generator.normal(10, 0.5, 64)).astype(np.int64))
        assert found.straggler_ratio is not None and found.straggler_ratio_in_order is not None
        assert found.straggler_ratio <= found.straggler_ratio_in_order
        ratios.append((found.straggler_ratio, found.straggler_ratio_in_order))
    assigned, in_order = np.mean(ratios, 0)
    assert assigned < 1.05 < 1.25 < in_order


def test_costs_that_are_even_already_stay_in_order() -> None:
    found = assign(4, 2, 2, np.array([5, 1, 4, 2]))
    assert found.packs == [[0, 1], [2, 3]]
    assert found.straggler_ratio == found.straggler_ratio_in_order == 1
    nothing = assign(4, 2, 1, np.zeros(4, np.int64))
    assert nothing.straggler_ratio == 1


def test_pairs_that_a_token_sees() -> None:
    """Counted one by one: a token sees itself and those before it, as far as the window reaches."""
    tokens = np.array([1, 2, 7, 8, 9, 30])
    nothing = np.zeros_like(tokens)
    for window in (None, 1, 8):
        costs = TokenCosts(token=0, pair=((window, 3),), patch=0, patch_pair=0, audio_frame=0)
        counted = [3 * sum(min(n + 1, window or n + 1) for n in range(length)) for length in tokens.tolist()]
        assert costs.of(tokens, nothing, nothing, nothing).tolist() == counted
    costs = TokenCosts(token=2, pair=(), patch=3, patch_pair=5, audio_frame=7)
    one = np.ones(1, np.int64)
    assert costs.of(one, 10 * one, 100 * one, 1000 * one).tolist() == [2 + 30 + 500 + 7000]


def longest_first_by_definition(costs: list[int], ranks: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(ranks)]
    for pack in sorted(range(len(costs)), key=lambda pack: -costs[pack]):
        open_ranks = [rank for rank in range(ranks) if len(packs[rank]) < len(costs) // ranks]
        packs[min(open_ranks, key=lambda rank: sum(costs[item] for item in packs[rank]))].append(pack)
    return packs


def test_longest_first() -> None:
    generator = np.random.default_rng(2)
    for most in (3, 10**15):  # with ties, and without
        for _ in range(50):
            ranks, each = generator.integers(2, 9, 2).tolist()
            costs = generator.integers(0, most, ranks * each)
            found = assign(len(costs), ranks, 1, costs)
            in_order = packs_in_order(len(costs), ranks, 1)
            assert found.packs in (longest_first_by_definition(costs.tolist(), ranks), in_order)
            assert found.packs != in_order or found.straggler_ratio == found.straggler_ratio_in_order
