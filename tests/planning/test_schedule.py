"""Times of pipeline schedules: closed forms, megatron-core's own counts, and simulations of every micro-batch."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_vlm.planning.schedule import (
    ChunkSeconds,
    Pass,
    _simulate,
    order_of_passes,
    passes_ahead,
    schedule_seconds,
)


@pytest.mark.parametrize(
    ("pipeline_size", "virtual_size", "num_micro_batches"), [(4, 1, 8), (4, 2, 8), (2, 5, 64), (8, 3, 24)]
)
def test_bubble_of_equal_stages(pipeline_size: int, virtual_size: int, num_micro_batches: int) -> None:
    """(P - 1) / V / (M + (P - 1) / V) of the time: Narayanan et al. 2021, equations 1 and 2."""
    chunks = [ChunkSeconds(1.0, 2.0)] * (pipeline_size * virtual_size)
    idle = (pipeline_size - 1) / virtual_size
    found = schedule_seconds(chunks, pipeline_size, num_micro_batches)
    assert found.bubble == pytest.approx(idle / (num_micro_batches + idle))
    assert found.imbalance == pytest.approx(1.0)


def test_one_stage_has_no_bubble() -> None:
    found = schedule_seconds([ChunkSeconds(1.0, 2.0)], 1, 7)
    assert found.total == 21.0 and found.bubble == 0.0


@pytest.mark.parametrize("virtual_size", [1, 2, 3])
@pytest.mark.parametrize("pipeline_size", [2, 4])
def test_passes_ahead_are_those_of_megatron_core(pipeline_size: int, virtual_size: int) -> None:
    for rank in range(pipeline_size):
        for num_micro_batches in (pipeline_size, 4 * pipeline_size):
            communicator = mock.Mock()
            communicator.pp_group.size.return_value, communicator.pp_group.rank.return_value = pipeline_size, rank
            communicator.virtual_pipeline_model_parallel_size = virtual_size if virtual_size > 1 else None
            _, _, expected, _ = get_pp_rank_microbatches(
                num_micro_batches, virtual_size, pipeline_size, p2p_communicator=communicator
            )
            assert passes_ahead(rank, pipeline_size, virtual_size, num_micro_batches) == expected


def test_every_pass_runs_once() -> None:
    passes = list(order_of_passes(1, 2, 3, 4))
    assert len(passes) == len(set(passes)) == 2 * 3 * 4
    assert {task.chunk for task in passes} == {1, 3, 5}
    for task in passes:  # none before its forward pass
        if not task.is_forward:
            assert passes.index(Pass(True, task.chunk, task.micro_batch)) < passes.index(task)


def test_further_rounds_take_equally_long() -> None:
    """Of stages that differ at random, extrapolated against simulated in full."""
    chance = random.Random(1)
    for _ in range(40):
        pipeline_size, virtual_size = chance.choice([2, 4, 8]), chance.choice([1, 2, 5])
        chunks = [
            ChunkSeconds(chance.uniform(0.5, 1.5), chance.uniform(1.0, 3.0), chance.choice([0.0, 0.05]))
            for _ in range(pipeline_size * virtual_size)
        ]
        num_micro_batches = pipeline_size * chance.choice([7, 16])
        found = schedule_seconds(chunks, pipeline_size, num_micro_batches)
        assert found.total == pytest.approx(_simulate(chunks, pipeline_size, num_micro_batches), rel=0.01)
        assert found.total >= max(found.busy)


def test_a_slow_first_stage_sets_the_pace() -> None:
    """Its own time, the other stages' before its first backward pass, and what it waits for messages."""
    slow, fast = ChunkSeconds(3.0, 6.0, 0.5), ChunkSeconds(1.0, 2.0, 0.5)
    found = schedule_seconds([slow, fast], 2, 2)
    # Forward, forward; the second's backward of the first micro-batch is there long before the second forward ends.
    assert found.total == pytest.approx(3 + 0.5 + 3 + 0.5 + 6 + 6)
    assert found.busy == (18.0, 6.0)
