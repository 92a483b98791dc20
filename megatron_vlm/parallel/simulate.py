"""One rank's process groups without the other ranks, for looking at layouts of any size on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.parallel.groups import build_groups


@contextmanager
def simulated_rank(
    rank: int,
    world_size: int,
    tensor_size: int,
    pipeline_size: int,
    expert_size: int = 1,
    expert_tensor_size: int = 1,
) -> Iterator[ProcessGroupCollection]:
    """Process groups as `rank` of `world_size` sees them; collectives on them do nothing.

    torch.distributed must not be initialised; it is again free afterwards.
    """
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield build_groups(tensor_size, pipeline_size, expert_size, expert_tensor_size)
    finally:
        torch.distributed.destroy_process_group()
