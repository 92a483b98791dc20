"""Reference of the sum of grouped products, which defines it and runs where no kernel does."""

from __future__ import annotations

import torch


def add_grouped_product_(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> None:
    """Add each group's product to its part of `total`; groups without rows are left as they are."""
    begin = 0
    for part, end in zip(total, ends.tolist(), strict=True):
        if end > begin:
            part.addmm_(gradient[begin:end].t().to(total.dtype), rows[begin:end].to(total.dtype))
        begin = end
