"""Ranks that meet at torch.distributed's store after work that may take longer than a collective is allowed to.

There they also see how far all of them are, and whether one stopped or failed, so that the others need not finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed

from megatron_vlm.errors import UserError
from megatron_vlm.platform.agreement import gather_if_any, is_any
from megatron_vlm.progress import Progress

LOOK_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
"""How often a rank that works looks how the others fare; the longest time between two looks of one that waits."""


class StoreMeeting:
    """What all ranks do together, step by step; made on every rank.

    Args:
        name: of the work, the same on every rank.
        is_stopped: returns whether this rank received a signal.
    """

    def __init__(self, name: str, is_stopped: Callable[[], bool]) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store = torch.distributed.distributed_c10d._get_default_store()
        # A process may meet for the same work again.
        self._prefix = f"{name}/{self._store.add(f'{name}/{self.rank}', 1)}"
        self._is_stopped = is_stopped
        self._steps, self._looked = 0, 0.0
        self._is_halted = False
        self._progress: Progress | None = None

    def do(self, action: Callable[[], None] | None, progress: Progress | None = None) -> bool:
        """Run an action on this rank, and wait until all ranks have run theirs; called on every rank.

        Args:
            action: may end early once `goes_on` is false, and raise a UserError; None on a rank with nothing to do.
            progress: shows how far all ranks are.

        Returns:
            Whether to go on, the same on every rank: not where some rank was stopped.

        Raises:
            UserError: that of the first rank that raised one; on every rank.
        """
        self._progress = progress
        self._steps += 1
        error: UserError | None = None
        try:
            if action is not None:
                action()
        except UserError as raised:
            error = raised
            self._halt()
        self._await_all()
        found = next((one for one in gather_if_any(error) if one is not None), None)
        if found is not None:
            raise found
        return not is_any(self._is_stopped())

    def goes_on(self) -> bool:
        """Return whether no rank stopped or failed, as far as this one has looked; shows how far they are."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            if self._is_stopped():
                self._halt()
            self._is_halted |= self._store.check([f"{self._prefix}/halt"])
            if self._progress is not None and self._progress.is_due:
                self._progress.update(self._store.add(self._bytes_key, 0))
        return not self._is_halted

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of what `do` runs are done on this rank."""
        self._store.add(self._bytes_key, num_bytes)

    @property
    def _bytes_key(self) -> str:
        return f"{self._prefix}/bytes {self._steps}"

    def _halt(self) -> None:
        self._store.set(f"{self._prefix}/halt", "")

    def _await_all(self) -> None:
        key, began = f"{self._prefix}/step {self._steps}", time.monotonic()
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world_size:
            self.goes_on()
            time.sleep(min(LONGEST_PAUSE_SECONDS, 0.01 + (time.monotonic() - began) / 20))
