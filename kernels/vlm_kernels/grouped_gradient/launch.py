"""Launch of the Triton kernel. Only a GPU, or Triton's interpreter, needs this module."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlm_kernels.grouped_gradient import triton_kernels

_VECTOR = 8  # elements


class Blocks(NamedTuple):
    """Sizes of a program's tile and step of rows, and launch parameters."""

    m: int
    n: int
    rows: int
    warps: int
    stages: int


# By major compute capability: the largest tiles found that compile without spills and fit in shared memory. A tile of
# 128 x 128 multiplies 64 times for each element that it loads; memory bounds groups of few rows, whose matrices are
# read and written whatever the tile. None has been timed; `benchmarks/kernels.py` does.
BLOCKS = {8: Blocks(128, 128, 32, 8, 4), 9: Blocks(128, 128, 64, 8, 4), 10: Blocks(128, 128, 64, 8, 4)}


def add_grouped_product_(
    total: torch.Tensor,
    gradient: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    major: int,
    blocks: Blocks | None = None,
    upcast: bool = False,
) -> None:
    """Launch the kernel for GPUs of a major compute capability; see `vlm_kernels.grouped_gradient`."""
    groups, columns_m, columns_n = total.shape
    assert total.is_contiguous() and total.dtype == torch.float32
    assert columns_m % _VECTOR == columns_n % _VECTOR == 0, "rows must be multiples of 16 bytes"
    blocks = blocks or BLOCKS[major]
    tiles_m, tiles_n = -(-columns_m // blocks.m), -(-columns_n // blocks.n)
    triton_kernels.add_products[(groups * tiles_m * tiles_n,)](
        total,
        gradient.contiguous(),
        rows.contiguous(),
        ends,
        columns_m,
        columns_n,
        tiles_m,
        tiles_n,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_T=blocks.rows,
        UPCAST=upcast,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,
    )
