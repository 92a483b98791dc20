"""Which ranks run on which nodes, and which groups of ranks cross from one node to another."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed

from megatron_vlm.parallel.layout import Layout

SHOWN_NODES = 4
_KEY = "placement/{}"


@dataclass(frozen=True)
class Node:
    """A machine, and the consecutive ranks that run there."""

    host: str
    ranks: range


@dataclass(frozen=True)
class GroupPlacement:
    """Where the groups of one kind are.

    Attributes:
        name: what is divided over such a group.
        size: ranks of each.
        count: number of such groups.
        most_nodes: nodes of the group that has most.
    """

    name: str
    size: int
    count: int
    most_nodes: int


def find_nodes() -> list[Node]:
    """Return all nodes of a run, on the first rank; the other ranks, which also have to call this, get an empty list.

    The first process of each node says where it is in torch.distributed's store: launchers number ranks node by node.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.distributed_c10d._get_default_store()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        size = os.environ.get("LOCAL_WORLD_SIZE", str(world_size))
        store.set(_KEY.format(rank), f"{size} {socket.gethostname()}")
    nodes: list[Node] = []
    first = 0
    while rank == 0 and first < world_size:
        size, _, host = store.get(_KEY.format(first)).decode().partition(" ")
        nodes.append(Node(host, range(first, first + int(size))))
        first += int(size)
    return nodes


def host_of(rank: int, nodes: Sequence[Node]) -> str:
    """Return the machine of a rank."""
    return next(node.host for node in nodes if rank in node.ranks)


def place_groups(layout: Layout, nodes: Sequence[Node]) -> list[GroupPlacement]:
    """Return where each kind of group with more than one rank is.

    Args:
        layout: sizes of all groups.
        nodes: the nodes, in the order of their ranks.
    """
    node_of_rank = np.repeat(np.arange(len(nodes)), [len(node.ranks) for node in nodes])
    sizes = (layout.pipeline_size, layout.data_size, layout.context_size, layout.tensor_size)
    expert_sizes = (layout.pipeline_size, layout.expert_data_size, layout.expert_size, layout.expert_tensor_size)
    placed = list(_along_axes(node_of_rank, sizes, ("pipeline", "data", "context", "tensor")))
    if layout.expert_size * layout.expert_tensor_size > 1:
        names = ("", "expert data", "expert", "expert tensor")
        placed += _along_axes(node_of_rank, expert_sizes, names)
    return placed


def _along_axes(node_of_rank: np.ndarray, sizes: Sequence[int], names: Sequence[str]) -> Iterator[GroupPlacement]:
    """Yield the groups along each named axis of the ranks, the fastest axis first."""
    grid = node_of_rank.reshape(sizes)
    for axis in reversed(range(len(sizes))):
        if sizes[axis] > 1 and names[axis]:
            groups = np.sort(np.moveaxis(grid, axis, -1).reshape(-1, sizes[axis]), axis=1)
            num_nodes = 1 + (np.diff(groups, axis=1) != 0).sum(axis=1)
            yield GroupPlacement(names[axis], sizes[axis], len(groups), int(num_nodes.max()))


def describe_placement(layout: Layout, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield a table of nodes and groups, and a warning for each kind of group that should not cross nodes and does.

    Nothing is said of a single node.
    """
    if len(nodes) < 2:
        return
    shown = [f"{node.host} {_span(node.ranks)}" for node in nodes[:SHOWN_NODES]]
    if len(nodes) > SHOWN_NODES:
        shown[-1:] = ["...", f"{nodes[-1].host} {_span(nodes[-1].ranks)}"]
    yield f"nodes     ranks by node: {', '.join(shown)}"
    for group in place_groups(layout, nodes):
        where = "inside a node" if group.most_nodes == 1 else f"over {group.most_nodes} nodes"
        plural = "s" * (group.count > 1)
        yield f"          {group.name:13} {group.count:5,} group{plural:1} of {group.size:4,} ranks, {where}"
    ranks = min(len(node.ranks) for node in nodes)
    for group in place_groups(layout, nodes):
        if group.most_nodes > 1 and group.name in ("tensor", "expert", "expert tensor"):
            yield (
                f"warning: {group.name} groups of {group.size} ranks cross nodes of {ranks}, which is slow: they "
                "communicate in every layer; sizes that divide the ranks of a node keep them inside"
            )


def _span(ranks: range) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
