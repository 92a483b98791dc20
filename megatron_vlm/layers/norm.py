"""Root-mean-square normalisation."""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.Module):
    """RMS norm computed in fp32 and cast back last, with the weight stored around zero or around one.

    Zero-centred weights multiply by `1 + weight`: adding the one when a checkpoint is imported would lose bits in bf16.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        zero_centered: multiply by `1 + weight`.
        dtype: of the weight.
    """

    def __init__(self, size: int, eps: float, zero_centered: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float()
        return (wide * (1.0 + weight if self.zero_centered else weight)).to(x.dtype)
