"""Process groups of a run, as megatron-core's `ProcessGroupCollection`.

Ranks are numbered tensor fastest, then context, data, pipeline: a tensor group sits inside one node. For experts the
same ranks of a pipeline stage are divided anew: expert-tensor fastest, then expert, then expert data.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vlm.errors import LaunchError

AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("expt_tp", "ep", "expt_dp", "pp")


def build_groups(
    tensor_size: int = 1,
    pipeline_size: int = 1,
    expert_size: int = 1,
    expert_tensor_size: int = 1,
    timeout: timedelta | None = None,
) -> ProcessGroupCollection:
    """Build every process group that megatron-core's engine asks for; the data-parallel size is what remains.

    Args:
        tensor_size: tensor-parallel ranks.
        pipeline_size: pipeline ranks.
        expert_size: ranks that divide the experts among them.
        expert_tensor_size: ranks that share each expert.
        timeout: of collectives; torch's default when None.

    Raises:
        LaunchError: the world size is not a multiple of tensor x pipeline, or of expert x expert-tensor x pipeline.
    """
    world_size = torch.distributed.get_world_size()
    if world_size % (tensor_size * pipeline_size):
        raise LaunchError(
            f"{world_size} ranks do not divide by tensor {tensor_size} x pipeline {pipeline_size}",
            fix=f"start a multiple of {tensor_size * pipeline_size} ranks",
        )
    stage_size = world_size // pipeline_size
    if stage_size % (expert_size * expert_tensor_size):
        raise LaunchError(
            f"the {stage_size} ranks of a pipeline stage do not divide by expert {expert_size} x expert-tensor "
            f"{expert_tensor_size}",
            fix=f"start a multiple of {expert_size * expert_tensor_size * pipeline_size} ranks",
        )
    data_size = stage_size // tensor_size
    options = {} if timeout is None else {"timeout": timeout}
    grid = HyperCommGrid([tensor_size, 1, data_size, pipeline_size], list(AXES))
    groups = ProcessGroupCollection()
    for axis in AXES:
        setattr(groups, axis, grid.create_pg(axis, **options))
    groups.dp_cp = groups.intra_dp_cp = groups.dp_cp_gtp_remat = grid.create_pg(["cp", "dp"], **options)
    groups.tp_cp = grid.create_pg(["tp", "cp"], **options)
    groups.mp = grid.create_pg(["tp", "pp"], **options)
    groups.tp_dp_cp = grid.create_pg(["tp", "cp", "dp"], **options)
    groups.intra_dist_opt = grid.create_pg(list(AXES), **options)
    groups.inter_dist_opt = None
    _set_expert_groups(groups, (expert_tensor_size, expert_size), stage_size, pipeline_size, options)
    groups.embd, groups.pos_embd = _embedding_groups(grid, timeout)
    return groups


def _set_expert_groups(
    groups: ProcessGroupCollection, sizes: tuple[int, int], stage_size: int, pipeline_size: int, options: dict[str, Any]
) -> None:
    """The groups of experts: (expert-tensor, expert) sizes over the ranks of each stage."""
    grid = HyperCommGrid([*sizes, stage_size // (sizes[0] * sizes[1]), pipeline_size], list(EXPERT_AXES))
    for axis in EXPERT_AXES[:3]:
        setattr(groups, axis, grid.create_pg(axis, **options))
    groups.intra_expt_dp = groups.expt_dp_gtp_remat = groups.expt_dp
    groups.tp_ep = grid.create_pg(["expt_tp", "ep"], **options)
    groups.tp_ep_pp = groups.tp_ep_pp_with_egtp_remat = grid.create_pg(["expt_tp", "ep", "pp"], **options)
    groups.gtp_remat = groups.expt_gtp_remat = None


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


def _embedding_groups(
    grid: HyperCommGrid, timeout: timedelta | None
) -> tuple[torch.distributed.ProcessGroup | None, torch.distributed.ProcessGroup | None]:
    """(first and last stage, which share tied embeddings; first stage alone) of this rank, None in between."""
    rank, mine, first = torch.distributed.get_rank(), None, None
    for pipeline in grid.get_rank_enum("pp"):
        ends = sorted({pipeline[0], pipeline[-1]})
        both, alone = (torch.distributed.new_group(ranks, timeout=timeout) for ranks in (ends, [pipeline[0]]))
        if rank in ends:
            mine = both
        if rank == pipeline[0]:
            first = alone
    return mine, first
