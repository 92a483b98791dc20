"""Memory that blocks of tensors go through, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class BlockMemory:
    """Memory for one block at a time; the next block takes it over.

    New memory for every block would cost as much as the copying, in new pages. Where other threads allocate meanwhile
    (gloo's do), the heap would also grow by many blocks that are free but not in one piece.

    Args:
        device: where the memory is; the host when None.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._bytes.device

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; whatever was taken before is overwritten."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=self._bytes.device)
        return self._bytes[:num_bytes].view(dtype).view(tuple(shape))
