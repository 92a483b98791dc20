"""Root-mean-square normalisation by itself, and fused with the residual additions around it.

A fused operation that includes a norm, here and in attention, gets each module's weight by a call: reading
`weight` would bypass the hooks by which megatron-core's overlapped parameter gathering waits for it.
"""

from __future__ import annotations

import torch

from megatron_vlm.parallel.parameters import declare, ones, zeros
from vlm_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_add, rms_norm_add_rms_norm


class RMSNorm(torch.nn.Module):
    """RMS norm computed in fp32 and cast back last, with the weight stored around zero or around one.

    Zero-centred weights multiply by `1 + weight`: adding the one when a checkpoint is imported would lose bits in bf16.

    Args:
        size: size of the last dimension.
        eps: constant added to the mean square.
        zero_centered: multiply by `1 + weight`.
        dtype: dtype of the weight.
        partial: whether each tensor rank normalises only some of the heads, or a shard of the sequence.
    """

    def __init__(self, size: int, eps: float, zero_centered: bool, dtype: torch.dtype, partial: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        initial = zeros if zero_centered else ones
        self.weight = declare(torch.nn.Parameter(torch.empty(size, dtype=dtype)), "vector", initial, partial=partial)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise the last dimension; shape and dtype stay. Without `x`, return the weight, for fused operations."""
        return self.weight if x is None else rms_norm(x, self.weight, self.eps, self.zero_centered)


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation with weight and bias."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(size, eps, dtype=dtype)
        declare(self.weight, "vector", ones)
        declare(self.bias, "vector", zeros)


def add_and_norm(x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (residual + x, norm of that)."""
    return add_rms_norm(x, residual, norm(), norm.eps, norm.zero_centered)


def norm_and_add(x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """Return residual + norm(x)."""
    return rms_norm_add(x, residual, norm(), norm.eps, norm.zero_centered)


def norm_add_and_norm(
    x: torch.Tensor, residual: torch.Tensor, post_norm: RMSNorm, norm: RMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (residual + post_norm(x), norm of that)."""
    assert (post_norm.eps, post_norm.zero_centered) == (norm.eps, norm.zero_centered)
    return rms_norm_add_rms_norm(x, residual, post_norm(), norm(), norm.eps, norm.zero_centered)
