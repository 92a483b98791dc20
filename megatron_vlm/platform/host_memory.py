"""Host memory that what a rank saves is copied into, for a forked process to write while training changes the rest.

It is shared with processes forked later, which read it where it is; of private pages that a device has pinned Linux
makes copies when a process is forked. On CUDA it is page-locked: a device copies into it at the speed of its bus.
torch's own page-locked memory would be rounded up to a power of two for each tensor.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Sequence

import torch

from megatron_vlm.platform.device import current

_ALIGNMENT_BYTES = 256


class HostMemory:
    """One block of host memory, as large as the largest set of tensors copied into it; it is kept for the next."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._locked_address: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return 0 if self._block is None else len(self._block)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors into the block, over what was copied before; returns when all are there.

        Args:
            tensors: on any device.

        Returns:
            The copies, each with a storage that ends where it ends: torch.save writes whole storages.
        """
        self._reserve(sum(map(_aligned_bytes, tensors)))
        copies, begin_byte = [], 0
        for tensor in tensors:
            if not tensor.numel():
                copies.append(torch.empty(tensor.shape, dtype=tensor.dtype))
                continue
            values = torch.frombuffer(self._block, dtype=tensor.dtype, count=tensor.numel(), offset=begin_byte)
            copies.append(values.view(tensor.shape).copy_(tensor.detach(), non_blocking=True))
            begin_byte += _aligned_bytes(tensor)
        current().synchronize()
        return copies

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self.num_bytes:
            return
        if self._locked_address is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._locked_address))
            self._locked_address = None
        self._block = mmap.mmap(-1, num_bytes)  # released when the last copy in it is
        if current().accelerated:
            self._lock()

    def _lock(self) -> None:
        address = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, self.num_bytes, 0))
        if error:
            _clear_error()
            warnings.warn(
                f"{self.num_bytes} bytes of host memory could not be page-locked (CUDA error {error}): "
                "copying what is saved takes longer",
                stacklevel=2,
            )
        else:
            self._locked_address = address


def _clear_error() -> None:
    """Take CUDA's last error back, which it would otherwise raise at the next kernel, whatever that is."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=current().device)


def _aligned_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
