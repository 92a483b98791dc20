"""Stands for what `torch.cuda` asks a driver for: streams and events whose order is not checked, and waits that are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

CAPABILITY = (9, 0)


@contextmanager
def cuda_without_driver(wait: Callable[[str], None]) -> Iterator[None]:
    """Replace the functions of `torch.cuda` that a training step calls.

    Args:
        wait: called with a name whenever the host would wait for the device.
    """

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait_stream(self, stream: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def record_event(self, event: Any = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            wait("Stream.synchronize()")

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, stream: Any = None) -> None: ...

        def wait(self, stream: Any = None) -> None: ...

        def synchronize(self) -> None:
            wait("Event.synchronize()")

    current = Stream()
    replacements: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: current,
        "default_stream": lambda device=None: current,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: wait("torch.cuda.synchronize()"),
        "get_device_capability": lambda device=None: CAPABILITY,
    }
    with ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
