"""One rank's process groups without the other ranks, for looking at layouts of any size on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout


@contextmanager
def simulated_rank(rank: int, layout: Layout) -> Iterator[ProcessGroupCollection]:
    """Process groups as one rank of a layout sees them; collectives on them do nothing.

    torch.distributed must not be initialised; it is again free afterwards.
    """
    torch.distributed.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_groups(layout)
    finally:
        torch.distributed.destroy_process_group()
