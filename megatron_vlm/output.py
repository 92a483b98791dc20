"""Output that a run survives: where its disk is full or its reader has gone, lines are lost and training goes on."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class EnduringStream:
    """A text stream whose writes never fail; everything else is that stream's.

    Args:
        stream: where the text goes, as long as that works.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # the second where it was closed
            return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def endure() -> None:
    """Make this process's standard output and standard error such streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, EnduringStream):
            setattr(sys, name, EnduringStream(stream))
