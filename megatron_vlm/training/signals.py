"""Requests to stop: SIGTERM, SIGUSR1 or SIGUSR2 lets the step finish, save and exit with 0; a second ends at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """Context in which the signals are noted instead of ending the process."""

    def __init__(self) -> None:
        self.number = 0
        """Number of the signal received, 0 without one."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
