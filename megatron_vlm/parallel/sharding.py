"""How a parameter is divided: the one place that knows, for loading, saving, exporting, initialising and comparing.

`ParameterSpec.tensor_dim` of a dense parameter is divided over the tensor ranks, which otherwise hold replicas. The
first dimension of experts is divided over the expert-parallel ranks, and `tensor_dim` over the expert-tensor ranks.
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
    """One divided dimension: this rank holds the `group.rank()`-th of `group.size()` equal parts."""

    dim: int
    group: Group


def splits(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> list[Split]:
    """The divided dimensions of a parameter; groups of one rank are left out."""
    spec = spec_of(parameter)
    divided = [(0, groups.ep), (spec.tensor_dim, groups.expt_tp)] if spec.is_expert else [(spec.tensor_dim, groups.tp)]
    return [Split(dim, group) for dim, group in divided if dim is not None and group.size() > 1]


def replica_group(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> Group:
    """The data ranks that hold copies of this parameter and share its optimizer state."""
    return groups.expt_dp if spec_of(parameter).is_expert else groups.dp_cp


def full_shape(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> tuple[int, ...]:
    """Shape over all ranks."""
    shape = list(parameter.shape)
    for split in splits(parameter, groups):
        shape[split.dim] *= split.group.size()
    return tuple(shape)


def own_part(
    whole: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection, first_dim: int = 0
) -> torch.Tensor:
    """This rank's part of a tensor of `full_shape`, as a view; those before `first_dim` are this rank's already."""
    for split in splits(parameter, groups):
        if split.dim < first_dim:
            continue
        size = parameter.shape[split.dim]
        whole = whole.narrow(split.dim, split.group.rank() * size, size)
    return whole


def gather_full(values: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    """Put together a parameter-shaped tensor (the parameter, its gradient) on every rank that shares it."""
    for split in splits(parameter, groups):
        parts = [torch.empty_like(values) for _ in range(split.group.size())]
        torch.distributed.all_gather(parts, values.detach().contiguous(), group=split.group)
        values = torch.cat(parts, dim=split.dim)
    return values
