"""The slowest rank is found, with data and tensor parallelism."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed

from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.training.stragglers import StepClock, Straggler
from tests.ranks import run_ranks

SECONDS, SLOW_SECONDS = 0.05, 0.45


def slowest_of(slow_rank: int, tensor_size: int) -> list[Straggler | None]:
    """On a rank: what is found after two steps, and after a step in which all are alike."""
    groups = build_groups(Layout.over(4, tensor_size=tensor_size), timedelta(seconds=60))
    clock, now = StepClock(groups), [0.0]

    def work(seconds: float) -> None:
        now[0] += seconds

    def reduce_gradients() -> None:
        work(SLOW_SECONDS)  # does not count
        torch.distributed.all_reduce(torch.ones(1), group=groups.dp)

    found = []
    with mock.patch("megatron_vlm.platform.device.time.perf_counter", lambda: now[0]):
        for steps, slow in ((2, slow_rank), (1, None)):
            for _ in range(steps):
                clock.begin()
                work(SLOW_SECONDS if torch.distributed.get_rank() == slow else SECONDS)
                clock.before(reduce_gradients)()
                clock.end()
            found.append(clock.slowest())
    return found


def test_the_slowest_rank_is_found() -> None:
    for tensor_size, slow_rank in ((1, 2), (2, 1)):
        found = run_ranks(4, slowest_of, slow_rank, tensor_size)
        assert found == [found[0]] * 4
        slow, alike = found[0]
        # The mean of four (two) ranks of which one takes nine times as long is 3 (5) times 0.05 s.
        assert slow == Straggler(slow_rank, pytest.approx(SLOW_SECONDS / (SECONDS * (3 if tensor_size == 1 else 5))))
        assert alike.ratio == pytest.approx(1)
