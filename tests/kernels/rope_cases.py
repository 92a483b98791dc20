"""Inputs of the operator that normalises and rotates queries and keys, for its tests on the host and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and what it does.

    Attributes:
        strided: queries and keys lie heads before tokens in memory.
        packed: queries and keys are views of one tensor, and keys do not begin where a vector may.
    """

    tokens: tuple[int, ...] = (5, 2)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    rotated: int = 16
    sections: int = 1
    weights: bool = True
    eps: float | None = EPS
    zero_centered: bool = False
    scaled: bool = False
    packed: bool = False
    strided: bool = False
    dtype: torch.dtype = torch.float64
    table_dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Inputs:
    """Arguments of `qk_norm_rope`."""

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cosine: torch.Tensor
    sine: torch.Tensor
    query_scale: torch.Tensor | None
    q_grad: torch.Tensor
    k_grad: torch.Tensor


def make(case: Case, seed: int = 0) -> Inputs:
    """Random inputs, rounded from fp64 to the case's dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def heads(count: int) -> torch.Tensor:
        if case.strided:
            return random(count, *reversed(case.tokens), case.head_dim).transpose(0, -2)
        return random(*case.tokens, count, case.head_dim)

    if case.packed:
        both = heads(sum(case.heads) + 1)
        q, k = both[..., : case.heads[0], :], both[..., -case.heads[1] :, :]
    else:
        q, k = (heads(count) for count in case.heads)
    weights = [random(case.head_dim) if case.weights and count else None for count in case.heads]
    angles = random(*case.tokens, case.rotated // 2, dtype=torch.float64)
    scale = 1 + random(*case.tokens, dtype=torch.float64).abs() if case.scaled else None
    cosine, sine = angles.cos().to(case.table_dtype), angles.sin().to(case.table_dtype)
    scale = None if scale is None else scale.to(case.table_dtype)
    return Inputs(q, k, *weights, cosine, sine, scale, *(heads(count) for count in case.heads))
