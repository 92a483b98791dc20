"""Where a tensor lies, which decides what computes with it."""

from __future__ import annotations

import torch


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels compute with the tensor, and not references."""
    return tensor.is_cuda


def compute_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Major and minor version of the instructions of the tensor's GPU, None elsewhere."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
