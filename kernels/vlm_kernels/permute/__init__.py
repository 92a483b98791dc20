"""Permutation of tokens by experts: a row for each expert that a token chose, grouped by expert, and back.

Rows that arrive from other ranks are grouped by rank, then by expert; a second permutation groups them by expert.

Sums run over a token's rows in the order of experts, so results are deterministic: both directions gather, one through
the inverse of the other's index, and no atomics are used. The caller passes the number of rows, so that the host never
waits for the device.

Shapes: T tokens, E experts, R rows, H hidden, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch

from vlm_kernels.library import define
from vlm_kernels.permute import reference


@dataclass(frozen=True)
class Permutation:
    """The token and expert of every row, and the rows of every token.

    Attributes:
        entry_of_row: [R] int32, index into a flattened [T, E] of each row's token and expert; ascends within an expert.
        rows: [R] int32, rows of token 0 in the order of experts, then those of token 1, and so on.
        starts: [T + 1] int32, where each token's rows begin in `rows`, and R.
        ends: [E] int32, where each expert's rows end.
        num_experts: number of columns of what `permute` takes for each token and expert.
    """

    entry_of_row: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    num_experts: int


def expert_permutation(routing_map: torch.Tensor, num_rows: int) -> Permutation:
    """Build the permutation of tokens by the experts that they chose.

    Args:
        routing_map: [T, E] bool, true where a token chose an expert.
        num_rows: number of true entries of the map, R.
    """
    entry_of_row, rows, starts, ends = _expert_permutation(routing_map.contiguous(), num_rows)
    return Permutation(entry_of_row, rows, starts, ends, routing_map.shape[1])


def chunk_permutation(ends: torch.Tensor, first_expert: int, num_experts: int, num_rows: int) -> Permutation:
    """Build the permutation of rows grouped by rank, then by expert, to rows grouped by expert, then by rank.

    Its tokens are the rows as they arrive, of which each has one row; `unpermute` brings them back.

    Args:
        ends: [N, E] int32, the `ends` of each rank's own permutation.
        first_expert: the first of the experts whose rows these are.
        num_experts: number of these experts.
        num_rows: number of their rows, R.
    """
    entry_of_row, rows, starts, own_ends = _chunk_permutation(ends.contiguous(), first_expert, num_experts, num_rows)
    return Permutation(entry_of_row, rows, starts, own_ends, 1)


@overload
def permute(x: torch.Tensor, permutation: Permutation, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def permute(x: torch.Tensor, permutation: Permutation, probs: None = None) -> tuple[torch.Tensor, None]: ...
def permute(
    x: torch.Tensor, permutation: Permutation, probs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copy each token to its rows.

    Args:
        x: tokens [T, H].
        permutation: the permutation of tokens by experts.
        probs: routing probabilities [T, E] fp32; None for none.

    Returns:
        Rows [R, H] in x's dtype, and each row's probability [R], None without `probs`.
    """
    rows, row_probs = _permute(x.contiguous(), None if probs is None else probs.contiguous(), *_parts(permutation))
    return rows, None if probs is None else row_probs


def unpermute(y: torch.Tensor, permutation: Permutation, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum each token's rows.

    Args:
        y: rows [R, H].
        permutation: the permutation of tokens by experts.
        weights: factor of each row, [R] fp32; None for none.

    Returns:
        Tokens [T, H] in y's dtype, summed in fp32 and rounded once.
    """
    return _unpermute(y.contiguous(), weights, *_parts(permutation))


def _parts(permutation: Permutation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return permutation.entry_of_row, permutation.rows, permutation.starts, permutation.num_experts


def _fake_permutation(routing_map: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, ...]:
    num_tokens, num_experts = routing_map.shape
    sizes = (num_rows, num_rows, num_tokens + 1, num_experts)
    return tuple(routing_map.new_empty(size, dtype=torch.int32) for size in sizes)


def _fake_chunk_permutation(
    ends: torch.Tensor, first_expert: int, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, ...]:
    return tuple(ends.new_empty(size) for size in (num_rows, num_rows, num_rows + 1, num_experts))


def _fake_permute(x: torch.Tensor, probs: torch.Tensor | None, *index: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = index[0].shape[0]
    return x.new_empty((num_rows, x.shape[1])), _fake_numbers(x, probs, (num_rows,))


def _fake_permute_backward(
    grad_rows: torch.Tensor, grad_probs: torch.Tensor | None, *index: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = index[2].shape[0] - 1
    grad_x = grad_rows.new_empty((num_tokens, grad_rows.shape[1]))
    return grad_x, _fake_numbers(grad_x, grad_probs, (num_tokens, index[3]))


def _fake_unpermute(y: torch.Tensor, weights: torch.Tensor | None, *index: Any) -> torch.Tensor:
    return y.new_empty((index[2].shape[0] - 1, y.shape[1]))


def _fake_unpermute_backward(
    gradient: torch.Tensor, y: torch.Tensor | None, weights: torch.Tensor | None, *index: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = index[0].shape[0]
    return gradient.new_empty((num_rows, gradient.shape[1])), _fake_numbers(gradient, weights, (num_rows,))


def _fake_numbers(x: torch.Tensor, like: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.float32) if like is None else like.new_empty(shape)


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, probs, *index, ctx.num_experts = inputs
    ctx.has_probs = probs is not None
    ctx.save_for_backward(*index)


def _backward_of_permute(
    ctx: Any, grad_rows: torch.Tensor, grad_probs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    of_probs = grad_probs.contiguous() if ctx.has_probs else None
    grad_x, dense = _permute_backward(grad_rows.contiguous(), of_probs, *ctx.saved_tensors, ctx.num_experts)
    return grad_x, dense if ctx.has_probs else None, None, None, None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, weights, *index, ctx.num_experts = inputs
    # Without weights the gradient does not depend on the rows.
    ctx.save_for_backward(None if weights is None else y, weights, *index)


def _backward_of_unpermute(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_y, grad_weights = _unpermute_backward(gradient.contiguous(), *saved, ctx.num_experts)
    return grad_y, None if saved[1] is None else grad_weights, None, None, None, None


_INDEX = "Tensor entry_of_row, Tensor rows, Tensor starts, int num_experts"
_expert_permutation = define(
    "expert_permutation(Tensor routing_map, int num_rows) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.expert_permutation,
    _fake_permutation,
)
_chunk_permutation = define(
    "chunk_permutation(Tensor ends, int first_expert, int num_experts, int num_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.chunk_permutation,
    _fake_chunk_permutation,
)
_permute = define(
    f"permute(Tensor x, Tensor? probs, {_INDEX}) -> (Tensor, Tensor)",
    reference.permute,
    _fake_permute,
    _backward_of_permute,
    _save_index,
)
_permute_backward = define(
    f"permute_backward(Tensor grad_rows, Tensor? grad_probs, {_INDEX}) -> (Tensor, Tensor)",
    reference.permute_backward,
    _fake_permute_backward,
)
_unpermute = define(
    f"unpermute(Tensor y, Tensor? weights, {_INDEX}) -> Tensor",
    reference.unpermute,
    _fake_unpermute,
    _backward_of_unpermute,
    _save_rows,
)
_unpermute_backward = define(
    f"unpermute_backward(Tensor gradient, Tensor? y, Tensor? weights, {_INDEX}) -> (Tensor, Tensor)",
    reference.unpermute_backward,
    _fake_unpermute_backward,
)
