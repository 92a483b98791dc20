"""The assignment of tokens to context ranks by the load of their spans."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.context_balance import ROW_TOKENS, document_lengths, seen_keys
from megatron_vlm.data.context_blocks import (
    largest_to_mean,
    padded_length,
    plan_blocks,
    planned_positions,
)

PACKINGS = 20


def load_of(lengths: list[int], images: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Keys that each token of a packed row sees; in every document, images of so many tokens at every so many."""
    first, last = seen_keys(lengths, images, window=None)
    return last - first + 1


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("median", [ROW_TOKENS, 4096, 1024])
def test_ranks_share_attention_evenly(median: int, num_ranks: int) -> None:
    for seed in range(PACKINGS):
        random = np.random.default_rng(seed)
        load = load_of(document_lengths(random, median, ROW_TOKENS), (256, 640) if seed % 2 else (0, 1))
        positions = planned_positions(load, num_ranks)
        assert largest_to_mean(load[positions].sum(1)) <= 1.05


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 16, 40, 300, 1000, 4096, 5001])
def test_every_token_has_one_rank(length: int, num_ranks: int, multiple_of: int) -> None:
    """Of rows of any length, after padding that is no more than a short row needs."""
    padded = padded_length(length, num_ranks, multiple_of)
    assert padded >= length and padded % (num_ranks * multiple_of) == 0
    assert padded_length(padded, num_ranks, multiple_of) == padded
    assert padded - length < max(num_ranks * multiple_of, length * multiple_of / 8)
    load = load_of(document_lengths(np.random.default_rng(length), 50, padded))
    positions = planned_positions(load, num_ranks)
    assert positions.shape == (num_ranks, padded // num_ranks) and positions.dtype == np.int64
    assert (np.diff(positions, axis=1) > 0).all()
    assert np.array_equal(np.sort(positions, axis=None), np.arange(padded))


@pytest.mark.parametrize(
    ("length", "num_ranks", "block"), [(16, 2, 1), (40, 2, 2), (64, 2, 4), (1024, 2, 64), (4096, 4, 128)]
)
def test_short_rows_have_small_blocks(length: int, num_ranks: int, block: int) -> None:
    """An eighth of a rank's tokens: no smaller ones are tried to share a load that lies in a few tokens."""
    assert padded_length(length - 1, num_ranks) == length
    for size in (block, block // 2):
        load = np.ones(length, dtype=np.int64)
        load[: num_ranks * size] = 1_000_000
        is_even = largest_to_mean(load[planned_positions(load, num_ranks)].sum(1)) <= 1.03
        assert is_even == (size in (block, 0))


@pytest.mark.parametrize(("lengths", "block"), [((ROW_TOKENS,), 1024), ((12_288, *[512] * 8, 16_384), 256)])
def test_blocks_are_as_large_as_an_even_share_allows(lengths: tuple[int, ...], block: int) -> None:
    load = load_of(list(lengths))
    positions = planned_positions(load, 16)
    assert np.array_equal(positions, plan_blocks(load, 16, block))
    for larger in (size for size in (512, 1024) if size > block):
        assert largest_to_mean(load[plan_blocks(load, 16, larger)].sum(1)) > 1.03


def test_the_most_even_of_uneven_plans_is_taken() -> None:
    """One block has nearly all of the load: no size gives even shares, and smaller ones are better."""
    load = np.ones(4096, dtype=np.int64)
    load[:128] = 1_000_000
    positions = planned_positions(load, 2)
    imbalances = [largest_to_mean(load[plan_blocks(load, 2, block)].sum(1)) for block in (1024, 512, 256, 128)]
    assert largest_to_mean(load[positions].sum(1)) == min(imbalances)


def test_the_result_depends_on_values_only() -> None:
    """Not on the dtype of loads, nor on an earlier call; ties are broken by position and rank."""
    load = load_of(document_lengths(np.random.default_rng(1), 1024, ROW_TOKENS))
    expected = planned_positions(load, 8)
    for dtype in (np.int32, np.int64, np.float32, np.float64):
        assert np.array_equal(planned_positions(load.astype(dtype), 8), expected)
    assert plan_blocks(np.ones(8), 2, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_the_greatest_load_goes_first() -> None:
    """By hand: 9 to rank 0, 7 and 6 to rank 1, which is full, and the rest to rank 0."""
    load = np.array([1, 9, 6, 7])
    assert plan_blocks(load, 2, 1).tolist() == [[0, 1], [2, 3]]
