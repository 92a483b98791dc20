"""A rank's process groups: the ranks that megatron-core's own enumeration gives, made by few calls at any size."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from megatron.core.hyper_comm_grid import HyperCommGrid
from torch.distributed import get_process_group_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.errors import LaunchError
from megatron_vlm.parallel import groups as module
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from tests.ranks import run_ranks

# World, tensor, context, pipeline, expert, expert tensor.
LAYOUTS = [
    (1, 1, 1, 1, 1, 1),
    (8, 2, 1, 2, 1, 1),
    (8, 2, 2, 2, 2, 1),
    (16, 1, 1, 4, 4, 1),
    (16, 2, 1, 2, 2, 2),
    (24, 2, 2, 3, 4, 2),
    (64, 4, 2, 2, 8, 2),
]
# Groups by name, and the axes along which megatron-core's grid enumerates them.
DENSE = {
    **{axis: [axis] for axis in module.AXES},
    "dp_cp": ["cp", "dp"],
    "tp_cp": ["tp", "cp"],
    "mp": ["tp", "pp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
    "intra_dist_opt": [*module.AXES],
}
OF_EXPERTS = {
    **{axis: [axis] for axis in module.EXPERT_AXES[:3]},
    "tp_ep": ["expt_tp", "ep"],
    "tp_ep_pp": ["expt_tp", "ep", "pp"],
}


def ranks_of(group: torch.distributed.ProcessGroup | None) -> list[int] | None:
    return None if group is None else sorted(get_process_group_ranks(group))


def check(rank: int, layout: tuple[int, ...]) -> int:
    """Compare one rank's groups with the enumeration of all; returns how many calls made them."""
    world, tensor, context, pipeline, expert, expert_tensor = layout
    calls = mock.Mock(side_effect=torch.distributed.new_group)
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with mock.patch.object(torch.distributed, "new_group", calls):
            found = build_groups(
                Layout.over(
                    world,
                    tensor_size=tensor,
                    context_size=context,
                    pipeline_size=pipeline,
                    expert_size=expert,
                    expert_tensor_size=expert_tensor,
                )
            )
        dense = HyperCommGrid([tensor, context, world // (tensor * context * pipeline), pipeline], [*module.AXES])
        expert_data = world // (pipeline * expert * expert_tensor)
        of_experts = HyperCommGrid([expert_tensor, expert, expert_data, pipeline], [*module.EXPERT_AXES])
        for grid, names in ((dense, DENSE), (of_experts, OF_EXPERTS)):
            for name, axes in names.items():
                (expected,) = (sorted(ranks) for ranks in grid.get_rank_enum(axes) if rank in ranks)
                assert ranks_of(getattr(found, name)) == expected, name
        (stages,) = (sorted(ranks) for ranks in dense.get_rank_enum("pp") if rank in ranks)
        ends = sorted({stages[0], stages[-1]})
        assert ranks_of(found.embd) == (ends if rank in ends else None)
        assert ranks_of(found.pos_embd) == ([rank] if rank == stages[0] else None)
        assert ranks_of(found.single_rank) == [rank]
    finally:
        torch.distributed.destroy_process_group()
    return calls.call_count


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_those_of_megatron_core(layout: tuple[int, ...]) -> None:
    calls = {check(rank, layout) for rank in range(layout[0])}
    # Each rank must make equally many, or their names would differ.
    assert len(calls) == 1 and calls.pop() <= 16


def holders_of_the_embedding(rank: int) -> tuple[list[int] | None, int]:
    """Ranks with copies of a tied embedding that begins on the second of three stages, and how many calls made them."""
    calls = mock.Mock(side_effect=torch.distributed.new_group)
    torch.distributed.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
    try:
        with mock.patch.object(torch.distributed, "new_group", calls):
            layout = Layout.over(6, num_layers=4, pipeline_size=3, tensor_size=2, vision_pipeline_layout=[1, 1])
            return ranks_of(build_groups(layout).embd), calls.call_count
    finally:
        torch.distributed.destroy_process_group()


def test_the_embedding_may_begin_on_a_later_stage() -> None:
    found = [holders_of_the_embedding(rank) for rank in range(6)]
    assert [ranks for ranks, _ in found] == [None, None, [2, 4], [3, 5], [2, 4], [3, 5]]
    assert len({calls for _, calls in found}) == 1


def test_sixteen_thousand_ranks() -> None:
    """TP8, PP16, EP16: a rank makes as few groups as in small layouts, and they equal the enumeration."""
    layout = (16_384, 8, 1, 16, 16, 1)
    for rank in (0, 7, 1023, 1024, 9_999, 16_383):
        assert check(rank, layout) <= 16
    with simulated_rank(5_000, Layout.over(16_384, tensor_size=8, pipeline_size=16, expert_size=16)) as groups:
        assert groups.dp.size() == 128 and groups.tp.rank() == 0


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(LaunchError, match=r"8 ranks do not divide by tensor 2 x context 3 x pipeline 1"):
        check(0, (8, 2, 3, 1, 1, 1))


def sums(tensor: int, pipeline: int, expert: int, repeats: int) -> list[dict[str, float]]:
    """On a rank: the sum of all ranks' numbers over each group, for groups that are made several times."""
    found = []
    layout = Layout.over(4, tensor_size=tensor, pipeline_size=pipeline, expert_size=expert)
    for _ in range(repeats):
        groups = build_groups(layout)
        result: dict[str, Any] = {}
        for name in ("tp", "dp", "pp", "dp_cp", "mp", "tp_ep", "expt_dp", "intra_dist_opt", "embd", "single_rank"):
            group = getattr(groups, name)
            if group is not None:
                number = torch.tensor(float(torch.distributed.get_rank()))
                torch.distributed.all_reduce(number, group=group)
                result[name] = (number.item(), float(sum(get_process_group_ranks(group))))
        found.append(result)
    return found


@pytest.mark.parametrize(("tensor", "pipeline", "expert"), [(1, 4, 1), (2, 2, 1), (2, 1, 4), (1, 2, 2)])
def test_they_carry_collectives_however_often_they_are_made(tensor: int, pipeline: int, expert: int) -> None:
    """Stages between the first and the last are in fewer groups; the next groups must find each other all the same."""
    for repeats in run_ranks(4, sums, tensor, pipeline, expert, 2):
        for result in repeats:
            assert all(found == expected for found, expected in result.values()), result
