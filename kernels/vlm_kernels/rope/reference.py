"""Reference of the norm and rotation of queries and keys, which defines the operators and runs without a GPU.

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
    """Return rotated queries and keys, and one over their root mean squares [*T, N, 1], empty without norms."""
    q, q_rstd = _normalized(q, q_weight, eps, zero_centered)
    k, k_rstd = _normalized(k, k_weight, eps, zero_centered)
    q, k = (_rotated(x, cosine, sine, sections).to(x.dtype) for x in (q, k))
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
    """Return the gradients of queries, keys and both weights, the latter empty where there is no weight."""
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
    """Gradients of a norm's input and weight from that of its output, which is in fp32 or wider and is overwritten."""
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


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sections: int) -> torch.Tensor:
    """The rotated heads in new contiguous memory, every multiplication and sum rounded to the wider of both dtypes."""
    size = 2 * cosine.shape[-1]
    turning, crossed = x[..., :size], x[..., :size] * _whole(sine, sections)
    out = torch.mul(turning, _whole(cosine, sections), out=crossed.new_empty(crossed.shape))
    (first, second), (crossed_first, crossed_second) = _pairs(out, sections), _pairs(crossed, sections)
    first -= crossed_second
    second += crossed_first
    return out if size == x.shape[-1] else torch.cat((out, x[..., size:]), dim=-1)


def _rotated_back(grad: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sections: int) -> torch.Tensor:
    """The gradient rotated by the opposite angles, in fp32 or wider."""
    dtype = _wide(grad)
    return _rotated(grad, cosine.to(dtype), -sine.to(dtype), sections)


def _whole(table: torch.Tensor, sections: int) -> torch.Tensor:
    """A table [*T, R / 2] as [*T, 1, R], with each angle's value at both elements of its pair."""
    return table.unflatten(-1, (sections, 1, -1)).repeat_interleave(2, dim=-2).flatten(-3).unsqueeze(-2)


def _pairs(x: torch.Tensor, sections: int) -> tuple[torch.Tensor, ...]:
    """Views [*T, N, C, R / 2C] of the first and of the second elements of the pairs."""
    return x.unflatten(-1, (sections, 2, -1)).unbind(-2)
