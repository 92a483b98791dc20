"""Block sizes of the kernels, by head dim and GPU, set by a table: nothing is tuned while a model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """How one kernel is launched.

    Attributes:
        queries: of a block.
        keys: of a block.
        shares: programs that split the columns of a result; each computes all scores.
        warps: of a program.
        stages: depth of the loads' pipeline.
    """

    queries: int
    keys: int
    shares: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """Launches of the forward pass, of dq, and of dk with dv."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


CONFIGURATIONS: dict[tuple[int, int], Configuration] = {
    # (columns, major compute capability)
    (64, 9): Configuration(Blocks(128, 128, 1, 8, 2), Blocks(128, 64, 1, 8, 2), Blocks(64, 128, 1, 8, 2)),
}


def columns_of(head_dim: int) -> int:
    """Columns that a product computes: the power of two at or above the head dim."""
    return 1 << (head_dim - 1).bit_length()


def configuration(head_dim: int, major: int) -> Configuration:
    """Launches for a head dim on a compute capability."""
    return CONFIGURATIONS[columns_of(head_dim), major]


# (head dim, compute capability) whose kernels have passed `tests/gpu/test_kernels_span_attention.py` on such a GPU and
# whose rows of `benchmarks/kernels.py` there are not behind FlexAttention's. Adding a pair turns its kernels on.
PROVEN: frozenset[tuple[int, tuple[int, int]]] = frozenset()


def is_proven(q: torch.Tensor) -> bool:
    """Whether our kernels take queries [B, N, S, D] on their GPU; fp32 products would be rounded to TF32."""
    if not PROVEN or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (q.shape[-1], torch.cuda.get_device_capability(q.device)) in PROVEN
