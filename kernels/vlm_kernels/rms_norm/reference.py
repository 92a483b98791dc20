"""Reference of RMS norms and the residual additions around them, in plain PyTorch.

Arithmetic is in fp32, in fp64 for fp64 tensors. Each result is rounded to its dtype once, and what follows uses the
rounded one, as separate operations would. Results are contiguous.
"""

from __future__ import annotations

import torch

Weight = torch.Tensor | None


def rms_norm(x: torch.Tensor, weight: Weight, eps: float, zero_centered: bool) -> torch.Tensor:
    wide = _wide(x)
    normed = wide * _inverse_rms(wide, eps)
    if weight is not None:
        normed *= _multiplier(weight, zero_centered)
    return normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: Weight, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (residual + x).contiguous()
    return total, rms_norm(total, weight, eps, zero_centered)


def rms_norm_add(
    x: torch.Tensor, residual: torch.Tensor, weight: Weight, eps: float, zero_centered: bool
) -> torch.Tensor:
    return rms_norm(x, weight, eps, zero_centered).add_(residual)


def rms_norm_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, post_weight: Weight, weight: Weight, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    total = rms_norm_add(x, residual, post_weight, eps, zero_centered)
    return total, rms_norm(total, weight, eps, zero_centered)


def rms_norm_backward(
    grad_normed: torch.Tensor,
    x: torch.Tensor,
    weight: Weight,
    addend: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    # With n = x r, r = (mean(x^2) + eps)^-1/2 and g the gradient times the weight: dx = r (g - n mean(g n)).
    wide, gradient = _wide(x), _wide(grad_normed)
    scale = _inverse_rms(wide, eps)
    normed = wide * scale
    product = gradient * normed
    if weight is None:
        projection = product.mean(-1, keepdim=True)
    else:
        multiplier = _multiplier(weight, zero_centered)
        projection = torch.matmul(product, multiplier)[..., None] / x.shape[-1]
        gradient = gradient * multiplier
    grad_x = torch.addcmul(gradient, normed, projection, value=-1).mul_(scale)
    if addend is not None:
        grad_x += _wide(addend)
    grad_weight = x.new_empty(0) if weight is None or not needs_weight else _sum_of_rows(product).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


def rms_norm_add_rms_norm_backward(
    grad_sum: torch.Tensor,
    grad_normed: torch.Tensor,
    x: torch.Tensor,
    total: torch.Tensor,
    post_weight: Weight,
    weight: Weight,
    eps: float,
    zero_centered: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = (eps, zero_centered, needs_weights)
    grad_residual, grad_weight = rms_norm_backward(grad_normed, total, weight, grad_sum, *settings)
    grad_x, grad_post_weight = rms_norm_backward(grad_residual, x, post_weight, None, *settings)
    return grad_residual, grad_x, grad_post_weight, grad_weight


def _wide(x: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    return wide.contiguous()


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _multiplier(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return 1.0 + _wide(weight) if zero_centered else _wide(weight)


def _sum_of_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(0, -2).sum(0) if rows.dim() > 1 else rows
