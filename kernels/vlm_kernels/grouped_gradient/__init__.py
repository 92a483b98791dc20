"""The gradient of grouped linear weights, summed in fp32 by the product itself into a gradient that exists.

torch's grouped product writes it in bf16, to be read and added: 12 bytes for each weight, the sum in the product 8, and
one rounding less. Our Triton kernel does that on GPUs on which it has been proven; elsewhere torch's product is added.

Shapes: T rows, E groups, M and N columns.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm

from vlm_kernels.device import compute_capability, is_on_gpu
from vlm_kernels.grouped_gradient import reference
from vlm_kernels.library import define

# Compute capabilities on which the kernel has passed `tests/gpu/test_kernels_grouped_gradient.py` and its row of
# `benchmarks/kernels.py` is ahead of torch's product and sum. Adding one enables the kernel there.
PROVEN: frozenset[tuple[int, int]] = frozenset()


def add_grouped_product_(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> None:
    """Add to each group's matrix the product of its rows of two tensors: total[e] += gradient_e^T rows_e.

    Args:
        total: [E, M, N] fp32, contiguous; changed in place, but for groups without rows.
        gradient: [T, M], rows grouped.
        rows: [T, N], of the same dtype.
        ends: [E] int32, where each group's rows end.
    """
    if is_on_gpu(rows) and not is_proven(rows):
        total.add_(grouped_mm(gradient.t(), rows, offs=ends))
    else:
        add_by_operator_(total, gradient.contiguous(), rows.contiguous(), ends)


def is_proven(rows: torch.Tensor) -> bool:
    """Return whether our kernel computes with rows [T, N]; not in fp32, whose product would round to TF32."""
    return rows.dtype in (torch.bfloat16, torch.float16) and compute_capability(rows) in PROVEN


def _launch(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> None:
    from vlm_kernels.grouped_gradient.launch import add_grouped_product_ as launch  # needs Triton

    major, _ = compute_capability(rows) or (0, 0)
    launch(total, gradient, rows, ends, major)


def _nothing(*_: torch.Tensor) -> None:
    pass


add_by_operator_ = define(
    "add_grouped_product_(Tensor(a!) total, Tensor gradient, Tensor rows, Tensor ends) -> ()",
    reference.add_grouped_product_,
    _nothing,
    kernel=_launch,
)
"""Compute `add_grouped_product_` by our operator: its kernel on a GPU, proven or not, the reference elsewhere."""
