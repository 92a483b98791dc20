"""How a parameter is sharded, in one place for loading, saving, exporting, initialising and comparing.

`ParameterSpec.tensor_dim` of a dense parameter is split over the tensor ranks, which otherwise hold replicas. The first
dimension of experts is split over the expert-parallel ranks, and `tensor_dim` over the expert-tensor ranks.
Replicas of a dense parameter are the ranks of `dp_cp`, those of an expert the ranks of `expt_dp`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.parallel.parameters import spec_of

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Split:
    """One sharded dimension: this rank holds the `group.rank()`-th of `group.size()` equal parts."""

    dim: int
    group: Group


def splits(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> list[Split]:
    """Return the sharded dimensions of a parameter, except those over groups of one rank."""
    spec = spec_of(parameter)
    divided = [(0, groups.ep), (spec.tensor_dim, groups.expt_tp)] if spec.is_expert else [(spec.tensor_dim, groups.tp)]
    return [Split(dim, group) for dim, group in divided if dim is not None and group.size() > 1]


def replica_group(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> Group:
    """Return the group of data ranks that hold copies of this parameter, over which its optimizer state is sharded."""
    return groups.expt_dp if spec_of(parameter).is_expert else groups.dp_cp


def full_shape(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> tuple[int, ...]:
    """Return the shape of the unsharded parameter."""
    shape = list(parameter.shape)
    for split in splits(parameter, groups):
        shape[split.dim] *= split.group.size()
    return tuple(shape)


def own_part(
    whole: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection, first_dim: int = 0
) -> torch.Tensor:
    """Return this rank's shard of a tensor, as a view.

    Args:
        whole: tensor of the parameter's `full_shape`, except that dimensions before `first_dim` are sharded already.
        parameter: this rank's shard of the parameter.
        groups: process groups.
        first_dim: first dimension to shard.
    """
    for split in splits(parameter, groups):
        if split.dim < first_dim:
            continue
        size = parameter.shape[split.dim]
        whole = whole.narrow(split.dim, split.group.rank() * size, size)
    return whole


def gather_full(values: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    """Gather a parameter-shaped tensor (the parameter, its gradient) on every rank that holds a shard of it."""
    for split in splits(parameter, groups):
        parts = [torch.empty_like(values) for _ in range(split.group.size())]
        torch.distributed.all_gather(parts, values.detach().contiguous(), group=split.group)
        values = torch.cat(parts, dim=split.dim)
    return values
