"""Launch of the Triton kernels: grids and strides. Only a GPU, or Triton's interpreter, needs this module.

Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.span_attention import triton_kernels
from kernels.span_attention.blocks import Blocks, Configuration, columns_of

_VECTOR = 8  # elements
_DELTA_ROWS = 64  # queries of a block; memory bound


def constants(head_dim: int, blocks: Blocks, upcast: bool = False) -> dict[str, Any]:
    """Compile-time arguments of a kernel other than `delta_of`."""
    columns = columns_of(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "COLUMNS": columns,
        "OWN": columns // blocks.shares,
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "UPCAST": upcast,
    }


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of batch, head and token, in vectors."""
    return [stride // _VECTOR for tensor in tensors for stride in tensor.stride()[:3]]


def _in_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its rows along the head dim are no whole vectors of 8 elements."""
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % _VECTOR == 0 for stride in tensor.stride()[:3])
    return tensor if tensor.stride(3) == 1 and aligned else tensor.clone(memory_format=torch.contiguous_format)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    blocks: Blocks,
    upcast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and the logarithms of the softmax's sums; `table` is `by_query` of `BlockRanges` for these blocks."""
    q, k, v = map(_in_vectors, (q, k, v))
    batch, heads, length, head_dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    triton_kernels.forward[(table.shape[1], heads * blocks.shares, batch)](
        *(q, k, v, out, lse, first, last, table),
        *_strides(q, k, v, out),
        *(heads, heads // k.shape[1], length, table.shape[1], scale),
        **constants(head_dim, blocks, upcast),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out, lse


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    by_query: torch.Tensor,
    by_key: torch.Tensor,
    scale: float,
    blocks: Configuration,
    upcast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; the tables are for the blocks of the two launches."""
    d_out, q, k, v, out = map(_in_vectors, (d_out, q, k, v, out))
    batch, heads, length, head_dim = q.shape
    key_heads = k.shape[1]
    sizes = (heads, heads // key_heads, length)
    delta = torch.empty_like(lse)
    triton_kernels.delta_of[(-(-length // _DELTA_ROWS), heads, batch)](
        *(out, d_out, delta, *_strides(out, d_out), heads, length),
        HEAD_DIM=head_dim,
        COLUMNS=columns_of(head_dim),
        BLOCK=_DELTA_ROWS,
    )
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    triton_kernels.backward_queries[(by_query.shape[1], heads * blocks.queries.shares, batch)](
        *(q, k, v, d_out, lse, delta, dq, first, last, by_query),
        *_strides(q, k, v, d_out, dq),
        *(*sizes, by_query.shape[1], scale),
        **constants(head_dim, blocks.queries, upcast),
        num_warps=blocks.queries.warps,
        num_stages=blocks.queries.stages,
    )
    triton_kernels.backward_keys[(by_key.shape[1], key_heads * blocks.keys.shares, batch)](
        *(q, k, v, d_out, lse, delta, dk, dv, first, last, by_key),
        *_strides(q, k, v, d_out, dk, dv),
        *(*sizes, by_key.shape[1], scale),
        **constants(head_dim, blocks.keys, upcast),
        num_warps=blocks.keys.warps,
        num_stages=blocks.keys.stages,
    )
    return dq, dk, dv
