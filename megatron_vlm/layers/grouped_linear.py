"""Linear layers of all experts of a rank by grouped matmuls, whose weight gradients go where megatron-core sums them.

torch's grouped matmul takes fp32 and bf16 on the host and on GPUs from Hopper on; on Ampere it brings `ends` to the
host, for which that waits, and multiplies for one expert after the other: right, and several times slower.

Shapes: T rows grouped by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from megatron_vlm.layers.operands import Operand, Provider
from megatron_vlm.layers.weight_gradient import added_to_main, main_gradient
from vlm_kernels.grouped_gradient import add_grouped_product_


def grouped_linear(x_TH: torch.Tensor, operand: Operand, ends: torch.Tensor) -> torch.Tensor:
    """Apply each expert's linear layer to its own rows, [T, in] to [T, out].

    The gradient of a weight with megatron-core's `main_grad` in fp32 is added to that, as megatron-core's own fused
    linear does.

    Args:
        x_TH: rows grouped by expert.
        operand: weight of all experts of the rank, [experts, ..., in] as its parameter has it, and low-rank pair.
        ends: [experts] int32, where each expert's rows end.
    """
    output: torch.Tensor = _GroupedLinear.apply(x_TH, operand.weight, ends)
    if operand.a is None or operand.b is None:
        return output
    inner = grouped_mm(x_TH, operand.a.transpose(1, 2), offs=ends)
    return output + operand.scale * grouped_mm(inner, operand.b.transpose(1, 2), offs=ends)


class _GroupedLinear(torch.autograd.Function):
    """A grouped matmul; the weights of a provider are made again in the backward pass, and have no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight: torch.Tensor | Provider, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TH if ctx.needs_input_grad[1] else None, ends)
        ctx.weight = weight  # itself: recomputation gives back saved tensors without their attributes
        return grouped_mm(x_TH, _matrices(weight).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_TH, ends = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            grouped_mm(gradient, _matrices(ctx.weight), offs=ends) if needs_x else None,
            _weight_gradient(ctx.weight, gradient, x_TH, ends) if needs_weight else None,
            None,
        )


def _matrices(weight: torch.Tensor | Provider) -> torch.Tensor:
    """Return the weights [experts, out, in]."""
    return weight.detach().flatten(1, -2) if isinstance(weight, torch.Tensor) else weight()


def _weight_gradient(
    weight: torch.Tensor, gradient: torch.Tensor, x_TH: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor | None:
    """Return what autograd gets; it must add nothing where the gradient is in `main_grad` already."""
    main = main_gradient(weight)
    if main is None or main.dtype != torch.float32:
        return grouped_mm(gradient.t(), x_TH, offs=ends).view_as(weight)
    add_grouped_product_(main.flatten(1, -2), gradient, x_TH, ends)
    return added_to_main(weight, main)
