"""Process groups of a run, as megatron-core's `ProcessGroupCollection`.

`Layout` defines how ranks are numbered; a tensor-parallel group lies within one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vlm.errors import LaunchError
from megatron_vlm.parallel.layout import Layout

AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("expt_tp", "ep", "expt_dp", "pp")


def build_groups(layout: Layout, timeout: timedelta | None = None) -> ProcessGroupCollection:
    """Build this rank's process groups for megatron-core.

    A rank makes only the groups that it is in, and one group where several have the same ranks, so the number of calls
    is small at any number of ranks.

    Args:
        layout: sizes of all groups.
        timeout: how long a collective may take; torch's default when None.

    Returns:
        megatron-core's collection, with an additional group `single_rank` of this rank only.

    Raises:
        LaunchError: the layout is for a different number of ranks.
    """
    world_size = torch.distributed.get_world_size()
    if world_size != layout.world_size:
        raise LaunchError(f"{world_size} ranks run, but the layout is {layout}", fix=f"start {layout.world_size} ranks")
    grid = HyperCommGrid([layout.tensor_size, layout.context_size, layout.data_size, layout.pipeline_size], list(AXES))
    sizes_of_experts = [layout.expert_tensor_size, layout.expert_size, layout.expert_data_size, layout.pipeline_size]
    expert_grid = HyperCommGrid(sizes_of_experts, list(EXPERT_AXES))
    own = _OwnGroups(timeout)
    groups = ProcessGroupCollection()
    for axis in AXES:
        setattr(groups, axis, own.along(grid, axis))
    groups.dp_cp = groups.intra_dp_cp = groups.dp_cp_gtp_remat = own.along(grid, "cp", "dp")
    groups.tp_cp = own.along(grid, "tp", "cp")
    groups.mp = own.along(grid, "tp", "pp")
    groups.tp_dp_cp = own.along(grid, "tp", "cp", "dp")
    groups.intra_dist_opt = own.along(grid, *AXES)
    groups.inter_dist_opt = None
    for axis in EXPERT_AXES[:3]:
        setattr(groups, axis, own.along(expert_grid, axis))
    groups.intra_expt_dp = groups.expt_dp_gtp_remat = groups.expt_dp
    groups.tp_ep = own.along(expert_grid, "expt_tp", "ep")
    groups.tp_ep_pp = groups.tp_ep_pp_with_egtp_remat = own.along(expert_grid, "expt_tp", "ep", "pp")
    groups.gtp_remat = groups.expt_gtp_remat = None
    groups.single_rank = own.of([torch.distributed.get_rank()])
    groups.embd, groups.pos_embd = own.embedding_groups(groups, layout.embedding_rank)
    return groups


class _OwnGroups:
    """A factory of this rank's groups.

    Every rank makes equally many, in the same order: otherwise ranks would wait for each other in a circle, and torch
    names a group that only its members make by its ranks and by the number of existing groups.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        self._made: dict[tuple[int, ...], torch.distributed.ProcessGroup] = {}

    def along(self, grid: HyperCommGrid, *axes: str) -> torch.distributed.ProcessGroup:
        """Return the group of the ranks that differ from this one only along these axes."""
        rank = torch.distributed.get_rank()
        return self.of(next(ranks for ranks in grid.get_rank_enum(list(axes)) if rank in ranks))

    def of(self, ranks: Sequence[int]) -> torch.distributed.ProcessGroup:
        """Return the group of these ranks, one of which is this one."""
        key = tuple(sorted(ranks))
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def embedding_groups(
        self, groups: ProcessGroupCollection, embedding_rank: int
    ) -> tuple[torch.distributed.ProcessGroup | None, torch.distributed.ProcessGroup | None]:
        """Return (stages that hold copies of a tied embedding; first stage only), with None on other stages."""
        stages = torch.distributed.get_process_group_ranks(groups.pp)
        holders = {stages[embedding_rank], stages[-1]}
        rank = torch.distributed.get_rank()
        # Each other stage makes a group of itself, which nobody uses, so that all ranks make equally many.
        made = self._make(sorted(holders) if rank in holders else [rank])
        return made if rank in holders else None, groups.single_rank if rank == stages[0] else None

    def _make(self, ranks: Sequence[int]) -> torch.distributed.ProcessGroup:
        made = torch.distributed.new_group(list(ranks), use_local_synchronization=True, **self._options)
        assert isinstance(made, torch.distributed.ProcessGroup), f"this rank is not one of {ranks}"
        return made


def initialize_megatron(seed: int, groups: ProcessGroupCollection) -> None:
    """Set the two things that megatron-core still keeps globally: memory buffers and random number streams."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(
        seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )
