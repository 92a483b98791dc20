"""Exchanges along the sequence around a column-parallel matmul: its input is gathered, the input's gradient summed.

Shapes: the sequence is the first dimension; under sequence parallelism a rank holds a shard of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

Group = torch.distributed.ProcessGroup


def gather_sequence(x: torch.Tensor, group: Group, async_op: bool = False) -> tuple[torch.Tensor, Any]:
    """Gather the full sequence from the tensor ranks; return it, and the handle to wait for if `async_op`."""
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    return whole, torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=async_op)


def reduce_input_gradient(
    gradient: torch.Tensor, group: Group, sequence_parallel: bool
) -> tuple[torch.Tensor, torch.distributed.Work | None]:
    """Start the sum over tensor ranks, scattered along the sequence under sequence parallelism.

    Returns:
        The result, and the handle to wait for, or None with a single rank.
    """
    if group.size() == 1:
        return gradient, None
    if not sequence_parallel:
        return gradient, torch.distributed.all_reduce(gradient, group=group, async_op=True)
    shard = gradient.new_empty((gradient.shape[0] // group.size(), *gradient.shape[1:]))
    return shard, torch.distributed.reduce_scatter_tensor(shard, gradient, group=group, async_op=True)
