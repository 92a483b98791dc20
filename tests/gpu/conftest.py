"""GPU tests: `make gpu` runs them. Without a GPU they are skipped, or with GPU_TESTS=host run on the host.

On the host, references stand in for kernels and "cuda" means the host: that shows mistakes of the tests themselves
before they cost time on a GPU, and nothing of the kernels. Of every test the first and the last parameters run;
GPU_TESTS=host_all runs all, which takes many minutes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

from tests.gpu.poison import poison
from vlm_kernels.span_attention import flex

MODE = os.environ.get("GPU_TESTS", "")
ON_HOST = MODE.startswith("host")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    of_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            of_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
            if not ON_HOST and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))
            if ON_HOST and item.get_closest_marker("kernels_only"):
                item.add_marker(pytest.mark.skip(reason="of kernels alone"))
    if MODE == "host":
        left_out = [item for variants in of_function.values() for item in variants[1:-1]]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class _OnHost(TorchFunctionMode):
    """Whatever is asked to be on "cuda" is made on the host."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        args = tuple("cpu" if isinstance(value, str) and value == "cuda" else value for value in args)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture(autouse=True, scope="session")
def host_stands_in() -> Iterator[None]:
    """With GPU_TESTS=host, what the tests ask of CUDA."""
    with contextlib.ExitStack() as stack:
        if ON_HOST:
            stack.enter_context(_OnHost())
            stream = mock.MagicMock()
            for name, value in {
                "get_device_capability": lambda device=None: (9, 0),
                "synchronize": lambda device=None: None,
                "set_sync_debug_mode": lambda mode: None,
                "memory_allocated": lambda: 0,
                "max_memory_allocated": lambda: 0,
                "reset_peak_memory_stats": lambda: None,
                "empty_cache": lambda: None,
                "Stream": lambda: stream,
                "current_stream": lambda: stream,
                "stream": lambda given: given,
            }.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(flex, "compiled", lambda: flex_attention.flex_attention))
            stack.enter_context(mock.patch.object(flex_attention, "_validate_device", lambda *tensors: None))
        yield


@pytest.fixture
def poisoned() -> None:
    """What is allocated next was not a number."""
    poison()
