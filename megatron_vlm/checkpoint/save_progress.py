"""Waiting for a checkpoint that other processes write, with progress by the bytes that are on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_vlm import platform
from megatron_vlm.progress import Progress

_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.005, 0.25


def num_bytes_saved(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors that the ranks save together; called on every rank.

    Args:
        state: what this rank gives to megatron-core, replicas of other ranks' tensors included.
    """
    tensors = [leaf for leaf in nested_values(state) if isinstance(leaf, ShardedTensor) and leaf.data is not None]
    own = sum(leaf.data.nbytes for leaf in tensors if is_main_replica(leaf.replica_id))
    total = torch.tensor(own, dtype=torch.int64, device=platform.current().device)
    torch.distributed.all_reduce(total)
    return int(total)


def wait_for_save(calls: AsyncCallsQueue, folder: Path, total_bytes: int) -> None:
    """Wait until all ranks have written, and finish the save; called on every rank.

    Ranks ask each other again and again instead of waiting for the slowest in one collective, whose time-out a large
    checkpoint could exceed.

    Args:
        calls: holds the save.
        folder: where it is written.
        total_bytes: the result of `num_bytes_saved`.
    """
    with Progress(f"saving {folder.name.partition('.')[0]}", total_bytes, _bytes_in(folder)) as progress:
        wait_seconds = _SHORTEST_WAIT_SECONDS
        while calls.get_num_unfinalized_calls():
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
            if progress.is_due:
                progress.update(min(_bytes_in(folder), total_bytes))
            calls.maybe_finalize_async_calls()


def _bytes_in(folder: Path) -> int:
    """Return the sizes of a folder's files together; a folder that is gone, or files that are, count as nothing."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
