"""Requests to stop: a signal lets the step finish, save and exit with 0; a second one ends at once.

The signals are SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2. A rank whose torchrun agent was killed stops in the same
way: nobody is left to signal it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType

import torch
import torch.distributed

from megatron_vlm import platform

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StoppedBeforeTraining(Exception):
    """Some rank received a signal before the first step.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequests:
    """Context in which the signals are noted instead of ending the process."""

    def __init__(self) -> None:
        self.number = 0
        """Number of the signal received, 0 without one."""
        self._previous: dict[int, object] = {}
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._said_that_agent_ended = False

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> int:
        """Return the number of the signal received, SIGTERM if torchrun's agent has ended, otherwise 0."""
        if self.number or self._agent in (None, os.getppid()):
            return self.number
        if not self._said_that_agent_ended:
            self._said_that_agent_ended = True
            with contextlib.suppress(OSError):  # the agent may have been the reader of stderr
                print(f"torchrun (process {self._agent}) has ended: stopping", file=sys.stderr, flush=True)
        return signal.SIGTERM

    def raise_if_stopped(self) -> None:
        """Let all ranks stop before the first step if some rank is to stop; called on every rank.

        Raises:
            StoppedBeforeTraining: some rank is.
        """
        number = torch.tensor(self.poll(), device=platform.current().device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        if number.item():
            raise StoppedBeforeTraining(int(number.item()))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
