"""Limits that end a run whose data give it too little to train on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_vlm.config import DataSettings, DataSource
from megatron_vlm.data.packing import WINDOW_ROWS
from megatron_vlm.data.plan import PlannedSource
from megatron_vlm.data.row_limits import MOST_STEPS_WITHOUT_LABELS, RowLimits
from megatron_vlm.errors import DataError


def limits(*num_rows: int, weights: tuple[float, ...] = (1.0,), **settings: Any) -> RowLimits:
    sources = [
        PlannedSource(f"{n}.jsonl", rows, "", w) for n, (rows, w) in enumerate(zip(num_rows, weights, strict=True))
    ]
    data = DataSettings([DataSource(source.path) for source in sources], 128, **settings)
    return RowLimits(data, sources, [f"source {number}" for number in range(len(sources))])


def step(
    limits: RowLimits, samples: int, bad: int = 0, too_long: int = 0, labels: tuple[int, ...] = (5,), *problems: str
) -> None:
    counters = {"samples": samples, "bad_rows": bad, "too_long_rows": too_long, "label_tokens": sum(labels)}
    limits.update(counters, labels, problems)


def test_bad_rows() -> None:
    tracker = limits(100_000)
    step(tracker, 8, 1)
    step(tracker, 192)
    step(tracker, 8, 1, 0, (5,), "rows.jsonl:9 is damaged")
    with pytest.raises(DataError, match=r"3 of 216 rows are bad, more than data.max_bad_fraction 0.01; .*rows.jsonl:9"):
        step(tracker, 8, 1)
    with pytest.raises(DataError, match="1 of 4 rows"):
        step(limits(8, max_bad_fraction=0.1), 4, 1)
    step(limits(8, max_bad_fraction=0.25), 1, 1)
    with pytest.raises(DataError):
        step(limits(100_000, max_bad_fraction=0.0), 1000, 1)


def test_too_long_rows() -> None:
    tracker = limits(100_000)
    step(tracker, 64, too_long=50)
    with pytest.raises(
        DataError, match=r"100 of 128 rows are longer than data.seq_length 128, more than .*fraction 0.5"
    ):
        step(tracker, 64, too_long=50)
    step(limits(100_000, max_too_long_fraction=1.0), 1000, too_long=1000)


def test_steps_without_labels() -> None:
    tracker = limits(100_000, max_bad_fraction=1.0)
    for _ in range(2):
        for _ in range(MOST_STEPS_WITHOUT_LABELS - 1):
            step(tracker, 1, 1, labels=(0,))
        step(tracker, 1)
    for _ in range(MOST_STEPS_WITHOUT_LABELS - 1):
        step(tracker, 1, labels=(0,))
    with pytest.raises(DataError, match=f"the last {MOST_STEPS_WITHOUT_LABELS} steps had no token to train"):
        step(tracker, 1, labels=(0,))


def test_a_source_without_a_usable_row() -> None:
    """A tenth of the rows are the second source's: its 10 come within the first 100, and then 100 times again."""
    tracker = limits(1000, 10, weights=(9.0, 1.0), max_bad_fraction=1.0)
    for _ in range(10):
        step(tracker, 100, 10, labels=(50, 0))
    with pytest.raises(DataError, match=r"no row of the source source 1 \(1.jsonl\) has a token to train"):
        step(tracker, 100, 10, labels=(50, 0))
    other = limits(1000, 10, weights=(9.0, 1.0), max_bad_fraction=1.0)
    for number in range(20):
        step(other, 100, 10, labels=(50, int(number == 3)))


def test_packed_rows_of_a_source_may_come_a_window_later() -> None:
    packed, seen = limits(1000, 10, weights=(9.0, 1.0), packing=True), 0
    with pytest.raises(DataError, match="no row of the source source 1"):
        for _ in range(100):
            step(packed, 100, labels=(50, 0))
            seen += 100
    assert seen == 2100  # 100 rows of 1100 of both, beyond a window, which is all 1010


def test_bad_rows_that_fill_the_first_packs_of_a_window() -> None:
    """They take one token each and go where that is left: all of a window's into few of its packs."""
    rows = 4 * WINDOW_ROWS
    packed, other = limits(rows, packing=True), limits(rows)
    for _ in range(4):
        step(packed, 96, 40)
        step(packed, WINDOW_ROWS - 96)
    with pytest.raises(DataError, match="40 of 96 rows are bad"):
        step(other, 96, 40)
    with pytest.raises(DataError, match=r"rows are bad, more than data.max_bad_fraction 0.01"):
        for _ in range(4):
            step(packed, 96, 60)
            step(packed, WINDOW_ROWS - 96)


def test_a_run_that_trained_nothing() -> None:
    tracker = limits(8)
    step(tracker, 4, too_long=4, labels=(0,))
    with pytest.raises(DataError, match="none of the 4 rows of this run had a token to train"):
        tracker.check_end()
    step(tracker, 4)
    tracker.check_end()


def test_counts_survive_a_checkpoint() -> None:
    tracker, resumed, former = (limits(100_000) for _ in range(3))
    step(tracker, 200, 2, 3, (7,))
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert resumed.state_dict() == tracker.state_dict()
    former.load_state_dict([2, 200])
    assert (former.bad_rows, former.rows_seen) == (2, 200)
    former.check_end()  # of a run that was finished then
    for each in (resumed, former):
        with pytest.raises(DataError, match="3 of 201 rows are bad"):
            step(each, 1, 1)
