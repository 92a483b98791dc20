"""Queries about a tensor's device, which decides whether a kernel or a reference computes with it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether kernels, not references, compute with the tensor; a fake tensor stands for one on a GPU."""
    return tensor.is_cuda or is_fake(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether the tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor)


def compute_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the compute capability (major, minor) of the tensor's GPU, None on other devices."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
