"""Norm and rotation of queries and keys in plain PyTorch: the definition, and what a CPU runs.

Shapes: T token dimensions (one or two), N heads, D head dim, R rotated elements (R <= D), C sections.
"""

from __future__ import annotations

import torch


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    query_scale: torch.Tensor | None,
    eps: float | None,
    zero_centered: bool,
    sections: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, and one over their root mean squares [*T, N, 1] (empty without a norm)."""
    q, q_rstd = _normalized(q, q_weight, eps, zero_centered)
    k, k_rstd = _normalized(k, k_weight, eps, zero_centered)
    q, k = _rotated(q, cosine, sine, sections), _rotated(k, cosine, sine, sections)
    if query_scale is not None:
        q = (q * query_scale[..., None, None]).to(q.dtype)
    return q, k, q_rstd, k_rstd


def backward(
    q_grad: torch.Tensor,
    k_grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    query_scale: torch.Tensor | None,
    zero_centered: bool,
    sections: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and both weights; empty where there is no weight."""
    if query_scale is not None:
        q_grad = q_grad * query_scale.to(_wide(q_grad))[..., None, None]
    results = [
        _normalized_backward(_rotated_back(grad, cosine, sine, sections), x, rstd, weight, zero_centered)
        for grad, x, rstd, weight in ((q_grad, q, q_rstd, q_weight), (k_grad, k, k_rstd, k_weight))
    ]
    (q_grad, q_weight_grad), (k_grad, k_weight_grad) = results
    return q_grad, k_grad, q_weight_grad, k_weight_grad


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _factor(weight: torch.Tensor, zero_centered: bool, dtype: torch.dtype) -> torch.Tensor:
    return 1.0 + weight.to(dtype) if zero_centered else weight.to(dtype)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if eps is None:
        return x, x.new_empty(0, dtype=_wide(x))
    wide = x.to(_wide(x))
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    wide = wide * rstd
    if weight is not None:
        wide *= _factor(weight, zero_centered, wide.dtype)
    return wide.to(x.dtype), rstd


def _normalized_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient of the norm's output, which is wide and overwritten."""
    if rstd.dim() == 1:
        return grad.to(x.dtype), grad.new_empty(0)
    normalized = x * rstd
    product, weight_grad = grad * normalized, grad.new_empty(0)
    if weight is not None:
        factor = _factor(weight, zero_centered, grad.dtype)
        weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        product *= factor
        grad *= factor
    grad -= normalized.mul_(product.mean(-1, keepdim=True))
    return grad.mul_(rstd).to(x.dtype), weight_grad


def _pairs(x: torch.Tensor, rotated: int, sections: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second elements [*T, N, C, R / 2C] of the pairs that turn."""
    first, second = x[..., :rotated].unflatten(-1, (sections, 2, -1)).unbind(-2)
    return first, second


def _angles(table: torch.Tensor, sections: int) -> torch.Tensor:
    """[*T, R / 2] to [*T, 1, C, R / 2C]."""
    return table.unflatten(-1, (sections, -1)).unsqueeze(-3)


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sections: int) -> torch.Tensor:
    rotated = 2 * cosine.shape[-1]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cosine.dtype), device=x.device)
    cosine, sine = _angles(cosine, sections), _angles(sine, sections)
    first, second = _pairs(x, rotated, sections)
    out_first, out_second = _pairs(out, rotated, sections)
    torch.mul(first, cosine, out=out_first)
    out_first -= second * sine
    torch.mul(second, cosine, out=out_second)
    out_second += first * sine
    out[..., rotated:] = x[..., rotated:]
    return out.to(x.dtype)


def _rotated_back(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sections: int) -> torch.Tensor:
    """Wide, and nothing else's memory."""
    rotated, dtype = 2 * cosine.shape[-1], _wide(grad)
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    cosine, sine = _angles(cosine.to(dtype), sections), _angles(sine.to(dtype), sections)
    first, second = _pairs(grad, rotated, sections)
    out_first, out_second = _pairs(out, rotated, sections)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine, value=-1)
    out[..., rotated:] = grad[..., rotated:]
    return out
