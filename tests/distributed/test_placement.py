"""Which groups cross nodes, compared with the groups that megatron-core's grid enumerates."""

from __future__ import annotations

import os
import re

import pytest
import torch.distributed
from megatron.core.hyper_comm_grid import HyperCommGrid

from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.placement import Node, describe_placement, find_nodes, place_groups
from tests.ranks import run_ranks

LAYOUTS = {
    "inside nodes": Layout.over(16, tensor_size=2, pipeline_size=2, expert_size=4),
    "larger than nodes": Layout.over(16, tensor_size=8, pipeline_size=2, expert_size=2, expert_tensor_size=2),
}


def nodes_of(*sizes: int) -> list[Node]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [
        Node(f"n{number}", range(end - size, end)) for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


@pytest.mark.parametrize("sizes", [(4,) * 4, (8, 8), (3, 13)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_are_where_their_ranks_are(
    layout: Layout, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")  # for megatron-core
    nodes = nodes_of(*sizes)
    node_of = {rank: node.host for node in nodes for rank in node.ranks}
    dense = HyperCommGrid(
        [layout.tensor_size, 1, layout.data_size, layout.pipeline_size], ["tensor", "c", "data", "pipeline"]
    )
    expert = HyperCommGrid(
        [layout.expert_tensor_size, layout.expert_size, layout.expert_data_size, layout.pipeline_size],
        ["expert tensor", "expert", "expert data", "pipeline"],
    )
    placed = place_groups(layout, nodes)
    kinds = {group.name for group in placed}
    assert kinds >= {"tensor", "pipeline", "expert"} and ("data" in kinds) == (layout.data_size > 1)
    for group in placed:
        grid = expert if group.name.startswith("expert") else dense
        expected = grid.get_rank_enum([group.name])
        assert (group.count, group.size) == (len(expected), len(expected[0]))
        assert group.most_nodes == max(len({node_of[rank] for rank in ranks}) for ranks in expected)


def test_table() -> None:
    table = "\n".join(describe_placement(LAYOUTS["larger than nodes"], nodes_of(4, 4, 4, 4)))
    assert "ranks by node: n0 0-3, n1 4-7, n2 8-11, n3 12-15" in table
    assert re.search(r"tensor +2 groups of +8 ranks, over 2 nodes\n", table)
    assert re.search(r"expert tensor +8 groups of +2 ranks, inside a node\n", table)
    assert "warning: tensor groups of 8 ranks cross nodes of 4" in table and "warning: expert" not in table
    assert "n0 0-1, n1 2-3, n2 4-5, ..., n7 14-15\n" in "\n".join(
        describe_placement(LAYOUTS["inside nodes"], nodes_of(*[2] * 8))
    )
    assert list(describe_placement(Layout.over(4), nodes_of(4))) == []


def on_two_nodes() -> list[Node]:
    """Of one and three ranks, on the first rank only."""
    rank = torch.distributed.get_rank()
    os.environ |= {"LOCAL_RANK": str(max(0, rank - 1)), "LOCAL_WORLD_SIZE": "1" if rank == 0 else "3"}
    try:
        nodes = find_nodes()
    finally:
        del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    torch.distributed.barrier()
    return [Node("", node.ranks) for node in nodes]


def test_nodes_find_each_other() -> None:
    first, *others = run_ranks(4, on_two_nodes)
    assert first == [Node("", range(1)), Node("", range(1, 4))] and others == [[], [], []]
