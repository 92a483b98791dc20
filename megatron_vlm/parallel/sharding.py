"""How a parameter is divided: the one place that knows, for loading, saving, exporting, initialising and comparing.

Dense parameters carry megatron-core's attributes: `tensor_model_parallel` and `partition_dim` split one dimension over
the tensor ranks, anything else is a replica there. Experts carry `expert_splits` instead: their first dimension is
divided over the expert-parallel ranks, and one more over the expert-tensor ranks. Replicas of a dense parameter are the
ranks of `dp_cp`, those of an expert the ranks of `expt_dp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Split:
    """One divided dimension: this rank holds the `group.rank()`-th of `group.size()` equal parts."""

    dim: int
    group: Group


def mark_expert(parameter: torch.nn.Parameter, tensor_dim: int) -> None:
    """Declare an expert parameter: dim 0 over the expert ranks, `tensor_dim` over the expert-tensor ranks.

    `allreduce = False` is megatron-core's mark for gradients that are summed over `expt_dp`. It is set with a single
    expert rank too, so that the optimizer has the same parts in every layout and its state can be divided anew.
    """
    parameter.expert_splits = ((0, "ep"), (tensor_dim, "expt_tp"))  # type: ignore[attr-defined]
    parameter.allreduce = False  # type: ignore[attr-defined]
    # megatron-core's gradient norm counts such a parameter on every rank; over `expt_tp` and `ep` there are no copies.
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter is divided over the expert ranks."""
    return hasattr(parameter, "expert_splits")


def splits(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> list[Split]:
    """The divided dimensions of a parameter; groups of one rank are left out."""
    if is_expert(parameter):
        named: Sequence[tuple[int, str]] = parameter.expert_splits  # type: ignore[attr-defined]
    elif getattr(parameter, "tensor_model_parallel", False):
        named = ((parameter.partition_dim, "tp"),)  # type: ignore[attr-defined]
    else:
        named = ()
    return [Split(dim, group) for dim, name in named if (group := getattr(groups, name)).size() > 1]


def replica_group(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> Group:
    """The data ranks that hold copies of this parameter and share its optimizer state."""
    return groups.expt_dp if is_expert(parameter) else groups.dp_cp


def whole_shape(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> tuple[int, ...]:
    """Shape over all ranks."""
    shape = list(parameter.shape)
    for split in splits(parameter, groups):
        shape[split.dim] *= split.group.size()
    return tuple(shape)


def own_part(
    whole: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection, first_dim: int = 0
) -> torch.Tensor:
    """This rank's part of a tensor of `whole_shape`, as a view; those before `first_dim` are this rank's already."""
    for split in splits(parameter, groups):
        if split.dim < first_dim:
            continue
        size = parameter.shape[split.dim]
        whole = whole.narrow(split.dim, split.group.rank() * size, size)
    return whole


def gather_whole(values: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    """Put together a parameter-shaped tensor (the parameter, its gradient) on every rank that shares it."""
    for split in splits(parameter, groups):
        parts = [torch.empty_like(values) for _ in range(split.group.size())]
        torch.distributed.all_gather(parts, values.detach().contiguous(), group=split.group)
        values = torch.cat(parts, dim=split.dim)
    return values
