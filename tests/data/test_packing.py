"""Packs: which rows share a row of a batch, and in which order."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_vlm.data import packing
from megatron_vlm.data.balance import TokenCosts
from megatron_vlm.data.packing import WINDOW_ROWS, PackedPlan, best_fit_decreasing
from megatron_vlm.data.plan import START, Pack, PlannedSource, Position, RowReference, SamplePlan
from megatron_vlm.data.row_lengths import RowLengths
from megatron_vlm.errors import DataError

SEQ_LENGTH = 64
SIZES = 230, 41


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_ROWS", 50)


def lengths_of(tokens: np.ndarray) -> RowLengths:
    nothing = np.zeros(len(tokens), np.int64)
    return RowLengths(tokens.astype(np.int32), nothing, nothing, nothing, nothing, "nowhere")


def random_lengths(seed: int = 0) -> list[RowLengths]:
    generator = np.random.default_rng(seed)
    return [lengths_of(generator.integers(1, SEQ_LENGTH + 1, size)) for size in SIZES]


def order(**changes: object) -> SamplePlan:
    sources = [PlannedSource(f"{name}.jsonl", size, name, 1.0) for name, size in zip("ab", SIZES, strict=True)]
    settings = {"sources": sources, "seed": 3, "shuffle": True} | changes
    return SamplePlan(**settings)  # type: ignore[arg-type]


def plan(lengths_seed: int = 0, seq_length: int = SEQ_LENGTH, **changes: object) -> PackedPlan:
    return PackedPlan(order(**changes), random_lengths(lengths_seed), seq_length)


def rows_of(packs: list[Pack]) -> list[RowReference]:
    return [row for pack in packs for row in pack]


def best_fit_by_scanning(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same heuristic, written as it is defined."""
    packs: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        room = [capacity - sum(lengths[other] for other in pack) for pack in packs]
        fitting = [number for number in range(len(packs)) if room[number] >= lengths[item]]
        if fitting:
            packs[min(fitting, key=lambda number: room[number])].append(item)
        else:
            packs.append([item])
    return sorted(sorted(pack) for pack in packs)


@pytest.mark.parametrize("capacity", [1, 7, 100])
def test_best_fit(capacity: int) -> None:
    generator = np.random.default_rng(capacity)
    for count in (0, 1, 2, 60):
        lengths = generator.integers(1, capacity + 1, count)
        packs = best_fit_decreasing(lengths, capacity)
        assert packs == best_fit_by_scanning(lengths.tolist(), capacity)
        assert sorted(item for pack in packs for item in pack) == list(range(count))
        assert all(lengths[pack].sum() <= capacity for pack in packs)
    assert best_fit_decreasing(np.array([3, 4, 6, 2]), 8) == [[0, 1], [2, 3]]


def test_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows of lognormal length: at least 98 % of their packs' tokens are real."""
    monkeypatch.setattr(packing, "WINDOW_ROWS", WINDOW_ROWS)
    size, capacity = 20_000, 4096
    tokens = np.exp(np.random.default_rng(5).normal(np.log(600), 1, size)).clip(1, capacity).astype(np.int32)
    source = PlannedSource("a.jsonl", size, "a")
    packed = PackedPlan(SamplePlan([source], 0, shuffle=True, one_pass=True), [lengths_of(tokens)], capacity)
    began = time.perf_counter()
    packs = packed.packs(START, packed.count_packs(size))
    milliseconds = (time.perf_counter() - began) * 1000 / -(-size // WINDOW_ROWS)
    assert sorted(row.row for row in rows_of(packs)) == list(range(size))
    assert max(tokens[[row.row for row in pack]].sum() for pack in packs) <= capacity
    fill = tokens.sum() / (len(packs) * capacity)
    print(f"fill {fill:.2%} of {len(packs)} packs, {milliseconds:.1f} ms per window of {WINDOW_ROWS} rows")
    assert fill >= 0.98


def test_packs_hold_the_rows_of_their_window() -> None:
    tokens = [source.tokens for source in random_lengths()]
    packed = plan()
    for window in range(4):
        packs = packed.window(window)
        expected = order().rows(window * 50, 50)
        places = {row: place for place, row in enumerate(expected)}
        assert len(places) == 50 and sorted(rows_of(packs)) == sorted(expected)
        assert all(sum(int(tokens[row.source][row.row]) for row in pack) <= SEQ_LENGTH for pack in packs)
        assert all([places[row] for row in pack] == sorted(places[row] for row in pack) for pack in packs)
        firsts = [places[pack[0]] for pack in packs]
        assert firsts != sorted(firsts)
    straight = plan(shuffle=False)
    for window in range(4):
        places = {row: place for place, row in enumerate(order(shuffle=False).rows(window * 50, 50))}
        firsts = [places[pack[0]] for pack in straight.window(window)]
        assert firsts == sorted(firsts)


def test_packs_are_a_function_of_the_position() -> None:
    """In steps of any size, from any position, forwards and back."""
    whole = plan().packs(START, 400)
    for size in (1, 7, 80, 400):
        packed, position, taken = plan(), START, list[Pack]()
        while len(taken) < 400:
            taken += packed.packs(position, size)
            position = packed.advance(position, size)
            assert position.samples == len(rows_of(taken))
        assert taken[:400] == whole
    position = plan().advance(START, 123)
    assert position.window > 1 and position.pack > 0
    packed = plan()
    assert packed.packs(position, 50) == whole[123:173]
    assert packed.packs(START, 50) == whole[:50]
    assert whole != plan(seed=4).packs(START, 400)


def test_windows_have_orders_of_their_own() -> None:
    """Where all packs are alike, and only their order can differ."""
    alike = PackedPlan(order(), [lengths_of(np.full(size, SEQ_LENGTH)) for size in SIZES], SEQ_LENGTH)
    orders = []
    for window in range(2):
        places = {row: place for place, row in enumerate(order().rows(window * 50, 50))}
        orders.append([places[pack[0]] for pack in alike.window(window)])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50)) and orders[0] != orders[1]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 150.0)])
def test_one_pass_has_every_row_once(weights: tuple[float, float]) -> None:
    """With weights of which the second leaves whole windows to rows that came before."""
    sources = [replace(source, weight=weight) for source, weight in zip(order().sources, weights, strict=True)]
    packed = plan(sources=sources, seed=0, shuffle=False, one_pass=True)
    count = packed.count_packs(10**6)
    packs = packed.packs(START, count + 3)
    rows = rows_of(packs)
    assert sorted((row.source, row.row) for row in rows) == [(s, n) for s in (0, 1) for n in range(SIZES[s])]
    assert all(packs[:count]) and packs[count:] == [[], [], []]
    assert packed.count_packs(5) == 5
    end = packed.advance(START, count)
    assert packed.advance(end, 8) == end and packed.packs(end, 2) == [[], []]


def test_costs_are_sums_over_the_rows_of_a_pack() -> None:
    generator = np.random.default_rng(0)
    lengths = [
        RowLengths(*(generator.integers(1, SEQ_LENGTH + 1, size) for _ in range(5)), stored_at="nowhere")
        for size in SIZES
    ]
    costs = TokenCosts(token=3, pair=((None, 2), (8, 5)), patch=7, patch_pair=11, audio_frame=13)
    packed = PackedPlan(order(), lengths, SEQ_LENGTH, costs)
    packs = [*packed.packs(START, 20), []]
    expected = [
        sum(
            3 * int(own.tokens[row.row])
            + 2 * sum(n + 1 for n in range(own.tokens[row.row]))
            + 5 * sum(min(n + 1, 8) for n in range(own.tokens[row.row]))
            + 7 * int(own.patches[row.row])
            + 11 * int(own.patch_pairs[row.row])
            + 13 * int(own.audio_frames[row.row])
            for row in pack
            for own in [lengths[row.source]]
        )
        for pack in packs
    ]
    found = packed.costs(packs)
    assert found is not None and found.tolist() == expected
    assert plan().costs(packs) is None
    assert packed.fingerprint == PackedPlan(order(), lengths, SEQ_LENGTH).fingerprint


def test_state_round_trip_and_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    position = plan().advance(START, 123)
    state = json.loads(json.dumps(plan().state(position)))
    assert plan().check_state(state) == position
    assert state["consumed_samples"] == position.samples == len(rows_of(plan().packs(START, 123)))
    moved = [replace(source, path=f"elsewhere/{source.path}") for source in order().sources]
    assert plan(sources=moved).check_state(state) == position
    halves = [lengths_of(np.maximum(1, own.tokens // 2)) for own in random_lengths()]
    for changed, message in (
        (plan(seed=4), "with: train.seed was 3, now 4 --"),
        (plan(seq_length=80), "with: data.seq_length was 64, now 80 --"),
        (PackedPlan(order(), halves, 40), "with: data.seq_length was 64, now 40 --"),
        (plan(lengths_seed=1), r"with: rows have other lengths in tokens \(model.hf_path, .* changed\) --"),
        (order(), "with: data.packing was true, now false --"),
        (plan(sources=[replace(order().sources[0], digest="c"), order().sources[1]]), "content of a.jsonl changed --"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            changed.check_state(state)
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"with: data.packing was false, now true --"):
        plan().check_state(order().state(Position(100)))
    for damaged in ({"pack": 10**6}, {"window": -1}, {"pack": "3"}, {"window": True}, {"window": 2**60}, {"pack": 0}):
        with pytest.raises(ValueError, match=next(iter(damaged))):
            plan().check_state(state | damaged)
    fewer = order(sources=[replace(order().sources[0], num_rows=40)])
    state_of_fewer = json.loads(json.dumps(PackedPlan(fewer, random_lengths(), SEQ_LENGTH).state(START)))
    more = order(sources=[replace(order().sources[0], num_rows=41)])
    with pytest.raises(DataError, match=r"with: a.jsonl had 40 rows, now 41 --"):
        PackedPlan(more, random_lengths(), SEQ_LENGTH).check_state(state_of_fewer)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 60)
    with pytest.raises(DataError, match="50 rows were packed together, this version packs 60"):
        plan().check_state(state)


def test_a_window_of_a_large_step_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes the packs of eight windows, and three callers ask for them one after the other."""
    packed, packings = plan(), []
    pack_window = packed._pack_window
    monkeypatch.setattr(packed, "_pack_window", lambda number: packings.append(number) or pack_window(number))
    size = sum(len(packed.window(number)) for number in range(8))
    packings.clear()
    position = packed.advance(START, size)
    assert packed.packs(START, size) and packed.advance(START, size) == position
    assert len(packings) < 2 * 8, "windows are packed again"
