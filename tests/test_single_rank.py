"""A rank alone in its data-parallel group exchanges nothing with itself; several ranks do what they did."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from megatron.core.distributed import param_and_grad_buffer
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm import platform
from megatron_vlm.platform import single_rank
from tests.ranks import run_ranks

SIZE = 1000
on_cpu = pytest.mark.skipif(platform.current().accelerated, reason="installed for gloo only")


class _Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def _exchange(reduce_scatter, all_gather, manager) -> tuple[torch.Tensor, list[str]]:
    """What megatron-core does with a buffer in a step: sum it, keep a share, gather the shares."""
    group = torch.distributed.group.WORLD
    buffer = torch.arange(float(SIZE)) + 10 * group.rank()
    share = buffer.chunk(group.size())[group.rank()]
    with _Operations() as operations:
        with manager(group, async_ops=False):
            reduce_scatter(share, buffer, op=torch.distributed.ReduceOp.SUM, group=group, async_op=False)
        with manager(group, async_ops=True) as work:
            all_gather(buffer, share, group=group, async_op=True)
        work.wait()
    return buffer, [name for name in operations.names if "view" not in name and "slice" not in name]


def _both() -> None:
    ours, operations = _exchange(
        param_and_grad_buffer.dist_reduce_scatter_func,
        param_and_grad_buffer.dist_all_gather_func,
        param_and_grad_buffer._coalescing_manager,
    )
    theirs, their_operations = _exchange(
        torch.distributed.reduce_scatter_tensor,
        torch.distributed.all_gather_into_tensor,
        torch.distributed._coalescing_manager,
    )
    assert torch.equal(ours, theirs)
    alone = torch.distributed.get_world_size() == 1
    # Their operations are seen, so none of ours means that nothing was done.
    assert their_operations
    assert operations == ([] if alone else their_operations)


@on_cpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_exchanges_within_a_group(world_size: int) -> None:
    run_ranks(world_size, _both)


def _elsewhere() -> None:
    target, source = torch.zeros(3), torch.ones(3)
    single_rank._unless_single(torch.distributed.all_gather_into_tensor)(
        target, source, group=torch.distributed.group.WORLD
    )
    assert torch.equal(target, source)


@on_cpu
def test_a_lone_rank_still_copies_between_two_tensors() -> None:
    run_ranks(1, _elsewhere)
