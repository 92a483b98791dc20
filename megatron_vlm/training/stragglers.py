"""Finds the rank whose part of a step takes longest, compared with the ranks that do the same for other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform


@dataclass(frozen=True)
class Straggler:
    """The slowest rank.

    Attributes:
        rank: its number.
        ratio: its time until its gradients are complete, over the mean of its data-parallel group.
    """

    rank: int
    ratio: float


class StepClock:
    """Adds up the time from the beginning of each step until this rank's gradients wait for those of other data ranks.

    Waiting for data counts; tensor and context ranks of one data rank wait for each other, and are slow together.

    Args:
        groups: this rank's process groups.
    """

    def __init__(self, groups: ProcessGroupCollection) -> None:
        self.groups = groups
        self._began: Any = None
        self._ready: Any = None
        self._seconds = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = platform.current().mark()

    def before[**P, R](self, reduce_gradients: Callable[P, R]) -> Callable[P, R]:
        """Return the function that sums gradients over data ranks, so that it first notes the time."""

        def marked(*arguments: P.args, **options: P.kwargs) -> R:
            self._ready = platform.current().mark()
            return reduce_gradients(*arguments, **options)

        return marked

    def end(self) -> None:
        """The step has ended, also on the device."""
        if self._began is not None and self._ready is not None:
            self._seconds += platform.current().seconds_between(self._began, self._ready)

    def slowest(self) -> Straggler | None:
        """Return the slowest rank since the last call, None without data parallelism; called on every rank."""
        seconds, self._seconds = self._seconds, 0.0
        size = self.groups.dp.size()
        if size == 1:
            return None
        device, rank = platform.current().device, torch.distributed.get_rank()
        total = torch.tensor(seconds, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total, group=self.groups.dp)
        ratio = seconds / (total / size)
        largest = ratio.clone()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        number = torch.where(ratio == largest, rank, -1)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return Straggler(int(number), float(largest))
