"""Where a tensor lies, which decides what computes with it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels compute with the tensor, and not references; what has no memory stands for what would."""
    return tensor.is_cuda or is_fake(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape only, so that nothing computes with it."""
    return isinstance(tensor, FakeTensor)


def compute_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Major and minor version of the instructions of the tensor's GPU, None elsewhere."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
