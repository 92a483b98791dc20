"""Host memory that is copied into, kept for the next copies, and page-locked where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlm.platform import host_memory
from megatron_vlm.platform.host_memory import HostMemory

TENSORS = [
    torch.arange(7, dtype=torch.bfloat16),
    torch.tensor(3.5),
    torch.empty(0, 4),
    torch.arange(24).view(2, 3, 4)[:, 1:],
    torch.tensor([True, False]),
]


def assert_copied(memory: HostMemory, tensors: list[torch.Tensor]) -> None:
    copies = memory.copy(tensors)
    assert len(copies) == len(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert copy.untyped_storage().nbytes() == tensor.nbytes, "torch.save would write more than the tensor"
        assert copy.data_ptr() % 64 == 0


def test_copies_are_equal_and_over_those_before() -> None:
    memory = HostMemory()
    assert memory.num_bytes == 0
    assert_copied(memory, TENSORS)
    block, num_bytes = memory._block, memory.num_bytes
    assert_copied(memory, [tensor.flip(0) if tensor.dim() else tensor + 1 for tensor in TENSORS])
    assert_copied(memory, TENSORS[1:])
    assert memory._block is block
    assert_copied(memory, [*TENSORS, torch.ones(1000)])
    assert memory.num_bytes == num_bytes + 4096


class _Driver:
    """Stands for the CUDA runtime: what is page-locked, by address."""

    def __init__(self, error: int) -> None:
        self.error = self.last_error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            assert flags == 0 and address not in self.locked
            self.locked[address] = num_bytes
        self.last_error = self.error
        return self.error

    def launch(self, *_: Any, **__: Any) -> None:
        """What torch does at every kernel."""
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> _Driver:
    found = _Driver(0)
    platform = SimpleNamespace(accelerated=True, device="cuda", synchronize=lambda: None)
    monkeypatch.setattr(host_memory, "current", lambda: platform)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    monkeypatch.setattr(torch, "zeros", found.launch)
    return found


def test_the_block_alone_is_page_locked(driver: _Driver) -> None:
    memory = HostMemory()
    for tensors in (TENSORS, TENSORS, [*TENSORS, torch.ones(1000)]):
        assert_copied(memory, tensors)
        first, *_ = memory.copy(tensors)
        assert driver.locked == {first.data_ptr(): memory.num_bytes}


def test_memory_that_cannot_be_page_locked_is_used_all_the_same(driver: _Driver) -> None:
    driver.error = 2
    memory = HostMemory()
    with pytest.warns(UserWarning, match=r"could not be page-locked \(CUDA error 2\)"):
        assert_copied(memory, TENSORS)
    driver.launch()  # the next kernel does not raise it
    driver.error = 0
    assert_copied(memory, [*TENSORS, torch.ones(1000)])
    assert len(driver.locked) == 1
