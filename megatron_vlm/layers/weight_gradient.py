"""Gradients of weights that are added to megatron-core's `main_grad` inside the product that computes them.

A product that returns its result in bf16, which is then added in fp32, moves 2 bytes out, 2 in, and 4 in and out per
parameter and micro-batch: 12. One that adds in place moves 8, and does not round.

megatron-core's data parallelism adds what autograd collected to `main_grad`, except where a parameter is marked with
`grad_added_to_main_grad`; it resets the mark once per step. Weights that it does not hold get a gradient as usual.

Source: megatron-core `tensor_parallel/layers.py` (`LinearWithGradAccumulationAndAsyncCommunication`).
"""

from __future__ import annotations

import torch

from vlm_kernels.device import is_on_gpu


def main_gradient(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the parameter's `main_grad`, to which products may be added; None if it has none, or one too narrow."""
    main: torch.Tensor | None = getattr(weight, "main_grad", None)
    is_wide = main is not None and main.dtype == torch.promote_types(weight.dtype, torch.float32)
    return main if is_wide and hasattr(weight, "grad_added_to_main_grad") else None


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0, overwrite: bool = False
) -> None:
    """Add `factor * left right` to a matrix in place, without rounding the product first.

    Args:
        total: the sum, [rows, columns], in fp32 or in the dtype of the factors.
        left: [rows, inner].
        right: [inner, columns].
        factor: factor of the product.
        overwrite: whether the product replaces what is in `total`, which may be uninitialised.
    """
    scales = {"beta": 0 if overwrite else 1, "alpha": factor}
    if left.dtype == total.dtype:
        total.addmm_(left, right, **scales)
    elif is_on_gpu(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, **scales, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), **scales)


def added_to_main(weight: torch.Tensor, main: torch.Tensor) -> torch.Tensor | None:
    """Mark that a parameter's gradient is in its `main_grad`, and return what autograd gets in its place."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        # megatron-core adds what autograd collects from the weight's other use, the lookup.
        return None
    if torch.is_anomaly_enabled():
        return torch.zeros_like(weight)  # fp32 bytes read as bf16 may be a NaN, for which anomaly detection looks
    # megatron-core never reads this gradient, but needs one; the memory of `main_grad` costs nothing extra, and a
    # detached view is not copied.
    return main.detach().flatten().view(weight.dtype)[: weight.numel()].view_as(weight)
