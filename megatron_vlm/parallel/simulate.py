"""One rank's process groups without the other ranks, to inspect layouts of any size on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout


@contextmanager
def simulated_rank(rank: int, layout: Layout) -> Iterator[ProcessGroupCollection]:
    """Yield process groups as one rank of a layout has them; collectives on them do nothing.

    torch.distributed must not be initialised, and is not initialised afterwards.
    """
    # torch wraps the hook for errors each time, to name the rank, and leaves it so.
    excepthook = sys.excepthook
    torch.distributed.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_groups(layout)
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = excepthook
