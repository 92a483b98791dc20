"""Block sizes of the kernels, by head dim and GPU, from a table: nothing is autotuned while a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm_kernels.device import compute_capability


@dataclass(frozen=True)
class Blocks:
    """Launch parameters of one kernel.

    Attributes:
        queries: queries per block.
        keys: keys per block.
        warps: warps per program.
        stages: depth of the pipeline of loads, over chunks where there are any, else over blocks.
        chunk: columns of one step of the matmuls over the head dim; 0 is all.
        shares: number of programs among which the columns of a result are split; each computes all scores.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    chunk: int = 0
    shares: int = 1

    def constants(self, head_dim: int) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel, except those that depend on where it runs."""
        columns = columns_of(head_dim)
        return {
            "HEAD_DIM": head_dim,
            "COLUMNS": columns,
            "CHUNK": self.chunk or columns,
            "OWN": columns // self.shares,
            "DEPTH": self.stages,
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options. With chunks, the loop over blocks is not pipelined, for lack of shared memory."""
        stages = 1 if self.chunk else self.stages
        return {"num_warps": self.warps, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Configuration:
    """Launches of the forward pass, of dq, and of dk with dv, and whether they use the GPU's copy engine (TMA)."""

    forward: Blocks
    queries: Blocks
    keys: Blocks
    tma: bool = True


def columns_of(head_dim: int) -> int:
    """Return the number of columns of a matmul: the smallest power of two that is at least the head dim."""
    return 1 << (head_dim - 1).bit_length()


# By columns and major compute capability: the largest tiles found that compile without spills and fit in shared
# memory (163 KiB, 227 KiB, 227 KiB) and tensor memory (512 columns). None has been timed; `benchmarks/kernels.py` does.
# With head dim 512, accumulators of all columns fit for dq only; before Hopper, for none.
# Matmuls bound attention, not memory (32 heads of 128, 8,192 tokens, causal: 0.55 TFLOP, 160 MiB), so tiles are large:
# a pair of blocks of 128 x 64 tokens multiplies 128 times for each element of a key or value that it loads. Chunks load
# the operands of the scores again for every pair, from the L2 cache, which may be what bounds head dim 512.
CONFIGURATIONS: dict[tuple[int, int], Configuration] = {
    (64, 8): Configuration(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(32, 128, 8, 2), tma=False),
    (128, 8): Configuration(Blocks(128, 32, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), tma=False),
    (256, 8): Configuration(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2, 64), Blocks(32, 64, 8, 2, 64), tma=False),
    (512, 8): Configuration(
        Blocks(64, 32, 8, 2, 64, 2), Blocks(64, 32, 8, 2, 64, 2), Blocks(32, 64, 8, 2, 64, 4), tma=False
    ),
    (64, 9): Configuration(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    (128, 9): Configuration(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (256, 9): Configuration(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2, 128), Blocks(64, 64, 8, 2, 128)),
    (512, 9): Configuration(Blocks(128, 32, 8, 2, 0, 2), Blocks(64, 64, 8, 2, 128), Blocks(64, 64, 8, 2, 128, 2)),
    (64, 10): Configuration(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (128, 10): Configuration(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2, 64)),
    (256, 10): Configuration(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2, 128), Blocks(64, 64, 8, 2, 128)),
    (512, 10): Configuration(Blocks(128, 32, 8, 2, 0, 2), Blocks(64, 64, 8, 2, 128), Blocks(64, 64, 8, 2, 128, 2)),
}


def configuration(head_dim: int, major: int) -> Configuration:
    """Return the launches for a head dim on GPUs of a major compute capability."""
    return CONFIGURATIONS[columns_of(head_dim), major]


# (head dim, compute capability) whose kernels have passed `tests/gpu/test_kernels_span_attention.py` on such a GPU and
# whose rows of `benchmarks/kernels.py` there are not behind FlexAttention's. Adding a pair enables its kernels.
PROVEN: frozenset[tuple[int, tuple[int, int]]] = frozenset()


def is_proven(q: torch.Tensor) -> bool:
    """Return whether our kernels are used for queries [B, N, Sq, D]; not in fp32, whose matmuls would round to TF32."""
    if not PROVEN or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (q.shape[-1], compute_capability(q)) in PROVEN
