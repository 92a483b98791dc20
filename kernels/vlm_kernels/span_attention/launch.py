"""Launch of the Triton kernels: grids, strides and descriptors. Only a GPU, or Triton's interpreter, needs this module.

Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from vlm_kernels.span_attention import triton_kernels
from vlm_kernels.span_attention.blocks import Blocks, Configuration, columns_of

_VECTOR = 8  # elements
_DELTA_ELEMENTS = 4096  # per program: 16 per thread; bound by memory
# Tensors that are moved in tiles of blocks of queries (others: of keys), and those in tiles of a program's own columns.
_QUERY_TILES = ("q", "q_own", "d_out", "d_own", "out", "dq")
_OWN_TILES = ("q_own", "d_own", "k_own", "out", "dq", "dk", "dv")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    launches: Configuration,
    upcast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp; `table` is `BlockRanges.by_query` for the launch's blocks."""
    q, k, v = map(_in_vectors, (q, k, v))
    first, last, table = first.contiguous(), last.contiguous(), table.contiguous()
    batch, heads, num_queries, head_dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, num_queries), dtype=torch.float32)
    blocks = launches.forward
    triton_kernels.forward[(table.shape[1], heads * blocks.shares, batch)](
        *_tiles(blocks, launches.tma, q=q, k=k),
        *_tiles(blocks, launches.tma, own=True, v=v, out=out),
        *(lse, first, last, table),
        *_strides(q, k, v, out),
        *(heads, heads // k.shape[1], num_queries, k.shape[2], table.shape[1], scale),
        **_constants(blocks, head_dim, launches.tma, upcast),
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
    launches: Configuration,
    upcast: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of q, k and v; the tables are for the blocks of the two launches."""
    d_out, q, k, v, out = map(_in_vectors, (d_out, q, k, v, out))
    lse, first, last, by_query, by_key = (tensor.contiguous() for tensor in (lse, first, last, by_query, by_key))
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    delta = _delta(out, d_out, lse)
    batch, heads, num_queries, head_dim = q.shape
    key_heads, num_keys = k.shape[1:3]
    sizes = (heads, heads // key_heads, num_queries, num_keys)

    blocks, tma = launches.queries, launches.tma
    triton_kernels.backward_queries[(by_query.shape[1], heads * blocks.shares, batch)](
        *_tiles(blocks, tma, q=q, k=k, k_own=k, v=v, d_out=d_out),
        *(lse, delta, *_tiles(blocks, tma, dq=dq), first, last, by_query),
        *_strides(q, k, v, d_out, dq),
        *(*sizes, by_query.shape[1], scale),
        **_constants(blocks, head_dim, tma, upcast),
    )
    blocks = launches.keys
    triton_kernels.backward_keys[(by_key.shape[1], key_heads * blocks.shares, batch)](
        *_tiles(blocks, tma, q=q, q_own=q, k=k, v=v, d_out=d_out, d_own=d_out),
        *(lse, delta, *_tiles(blocks, tma, dk=dk, dv=dv), first, last, by_key),
        *_strides(q, k, v, d_out, dk, dv),
        *(*sizes, by_key.shape[1], scale),
        **_constants(blocks, head_dim, tma, upcast),
    )
    return dq, dk, dv


def _delta(out: torch.Tensor, d_out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The sum of out * d_out over D, in the shape of `lse`."""
    batch, heads, num_queries, head_dim = out.shape
    columns = columns_of(head_dim)
    rows = _DELTA_ELEMENTS // columns
    delta = torch.empty_like(lse)
    triton_kernels.delta_of[(-(-num_queries // rows), heads, batch)](
        *(out, d_out, delta, *_strides(out, d_out), heads, num_queries),
        HEAD_DIM=head_dim,
        COLUMNS=columns,
        BLOCK=rows,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return delta


def box(name: str, blocks: Blocks, head_dim: int, own: bool = False) -> list[int]:
    """Return the shape [1, 1, rows, columns] of the tiles in which a kernel moves the tensor of this name."""
    constants = blocks.constants(head_dim)
    rows = blocks.queries if name in _QUERY_TILES else blocks.keys
    return [1, 1, rows, constants["OWN" if own or name in _OWN_TILES else "CHUNK"]]


def _tiles(blocks: Blocks, tma: bool, own: bool = False, **tensors: torch.Tensor) -> list[Any]:
    if not tma:
        return list(tensors.values())
    return [
        TensorDescriptor.from_tensor(tensor, box(name, blocks, tensor.shape[-1], own))
        for name, tensor in tensors.items()
    ]


def _constants(blocks: Blocks, head_dim: int, tma: bool, upcast: bool) -> dict[str, Any]:
    return {**blocks.constants(head_dim), "UPCAST": upcast, "TMA": tma, **blocks.options}


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, head and token, in vectors."""
    return [stride // _VECTOR for tensor in tensors for stride in tensor.stride()[:3]]


def _in_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its rows along the head dim are not aligned vectors of 8 elements or are expanded."""
    *sizes, head_dim = tensor.shape
    assert head_dim % _VECTOR == 0, "rows of whole vectors"
    *strides, element_stride = tensor.stride()
    # A dimension of size 1 may have any stride, which descriptors do not take and a copy would keep.
    strides = [head_dim if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    tensor = tensor.as_strided(tensor.shape, (*strides, element_stride))
    whole = all(stride and stride % _VECTOR == 0 for stride in strides)
    if whole and element_stride == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    copy = tensor.clone()  # in the same order in memory, as the operators promise
    return copy if copy.stride(3) == 1 else tensor.contiguous()
