"""RMS norms, standalone or fused with the residual additions around them.

`x` and `residual` are [..., size], `weight` is [size], all of one dtype: fp32, bf16 or fp16. A weight of None means
a norm without weight; with `zero_centered`, values are multiplied by `1 + weight`. Arithmetic is in fp32. Results
equal, bit for bit, those of separate operations that each round their result.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_kernels.library import define
from vlm_kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_add", "rms_norm_add_rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, zero_centered: bool = False) -> torch.Tensor:
    """Compute norm(x) = x / sqrt(mean(x^2) + eps) * weight."""
    return _rms_norm(x, weight, eps, zero_centered)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, zero_centered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `sum = residual + x` and norm(sum): where a pre-norm block ends and the next one begins.

    Returns:
        The tuple (sum, norm(sum)).
    """
    return _add_rms_norm(x, residual, weight, eps, zero_centered)


def rms_norm_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, zero_centered: bool = False
) -> torch.Tensor:
    """Compute residual + norm(x): where a block with a norm of its output ends."""
    return _rms_norm_add(x, residual, weight, eps, zero_centered)


def rms_norm_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    zero_centered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `sum = residual + norm(x)` with `post_weight`, and norm(sum) with `weight`: between "sandwich" blocks.

    Returns:
        The tuple (sum, norm(sum)).
    """
    return _rms_norm_add_rms_norm(x, residual, post_weight, weight, eps, zero_centered)


def _gradient_like(weight: torch.Tensor | None, x: torch.Tensor, is_needed: bool) -> torch.Tensor:
    return x.new_empty(0) if weight is None or not is_needed else torch.empty_like(weight)


_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad_normed, Tensor x, Tensor? weight, Tensor? addend, float eps, bool zero_centered, "
    "bool needs_weight) -> (Tensor, Tensor)",
    reference.rms_norm_backward,
    lambda grad_normed, x, weight, addend, eps, zero_centered, needs_weight: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        _gradient_like(weight, x, needs_weight),
    ),
)

_rms_norm_add_rms_norm_backward = define(
    "rms_norm_add_rms_norm_backward(Tensor grad_sum, Tensor grad_normed, Tensor x, Tensor sum, Tensor? post_weight, "
    "Tensor? weight, float eps, bool zero_centered, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.rms_norm_add_rms_norm_backward,
    lambda grad_sum, grad_normed, x, total, post_weight, weight, eps, zero_centered, needs_weights: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
        _gradient_like(post_weight, x, needs_weights),
        _gradient_like(weight, x, needs_weights),
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.zero_centered = inputs
    ctx.save_for_backward(output[0], weight)


def _save_added(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, weight, ctx.eps, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight)


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, post_weight, weight, ctx.eps, ctx.zero_centered = inputs
    ctx.save_for_backward(x, output[0], post_weight, weight)


def _backward(
    ctx: Any, grad_normed: torch.Tensor, addend: torch.Tensor | None, position: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a norm's input and of its weight, which is the operator's argument number `position`."""
    x, weight = ctx.saved_tensors
    needs_weight = weight is not None and ctx.needs_input_grad[position]
    grad_x, grad_weight = _rms_norm_backward(grad_normed, x, weight, addend, ctx.eps, ctx.zero_centered, needs_weight)
    return grad_x, grad_weight if needs_weight else None


def _rms_norm_gradients(ctx: Any, grad_normed: torch.Tensor) -> tuple[Any, ...]:
    return *_backward(ctx, grad_normed, None, 1), None, None


def _add_rms_norm_gradients(ctx: Any, grad_sum: torch.Tensor, grad_normed: torch.Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight = _backward(ctx, grad_normed, grad_sum, 2)
    return grad_x, grad_x, grad_weight, None, None


def _rms_norm_add_gradients(ctx: Any, grad_sum: torch.Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight = _backward(ctx, grad_sum, None, 2)
    return grad_x, grad_sum, grad_weight, None, None


def _rms_norm_add_rms_norm_gradients(ctx: Any, grad_sum: torch.Tensor, grad_normed: torch.Tensor) -> tuple[Any, ...]:
    x, total, post_weight, weight = ctx.saved_tensors
    needs_weights = any(ctx.needs_input_grad[2:4])
    grad_residual, grad_x, *grad_weights = _rms_norm_add_rms_norm_backward(
        grad_sum, grad_normed, x, total, post_weight, weight, ctx.eps, ctx.zero_centered, needs_weights
    )
    needed = [
        grad if is_needed else None for grad, is_needed in zip(grad_weights, ctx.needs_input_grad[2:4], strict=True)
    ]
    return grad_x, grad_residual, *needed, None, None


_rms_norm = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool zero_centered) -> Tensor",
    reference.rms_norm,
    lambda x, weight, eps, zero_centered: torch.empty_like(x, memory_format=torch.contiguous_format),
    _rms_norm_gradients,
    _save,
)

_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, bool zero_centered) -> (Tensor, Tensor)",
    reference.add_rms_norm,
    lambda x, residual, weight, eps, zero_centered: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    _add_rms_norm_gradients,
    _save_sum,
)

_rms_norm_add = define(
    "rms_norm_add(Tensor x, Tensor residual, Tensor? weight, float eps, bool zero_centered) -> Tensor",
    reference.rms_norm_add,
    lambda x, residual, weight, eps, zero_centered: torch.empty_like(x, memory_format=torch.contiguous_format),
    _rms_norm_add_gradients,
    _save_added,
)

_rms_norm_add_rms_norm = define(
    "rms_norm_add_rms_norm(Tensor x, Tensor residual, Tensor? post_weight, Tensor? weight, float eps, "
    "bool zero_centered) -> (Tensor, Tensor)",
    reference.rms_norm_add_rms_norm,
    lambda x, residual, post_weight, weight, eps, zero_centered: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    _rms_norm_add_rms_norm_gradients,
    _save_both,
)
