"""Reference of the permutation of tokens by experts, which defines it and runs where no kernel does.

Arguments are those of `vlm_kernels.permute`; a permutation is passed as its first three tensors.

Shapes: T tokens, E experts, R rows (a token has one for each expert that it chose), H hidden, N ranks.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag, pad


def expert_permutation(
    routing_map: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four tensors of a `vlm_kernels.permute.Permutation` from a routing map [T, E] bool."""
    num_experts = routing_map.shape[1]
    by_expert = routing_map.t().contiguous()
    expert_R, token_R = by_expert.nonzero(as_tuple=True)
    assert len(token_R) == num_rows, "as many rows as choices"
    row_TE = (by_expert.flatten().cumsum(0) - 1).view_as(by_expert).t()
    return (
        (token_R * num_experts + expert_R).int(),
        row_TE[routing_map].int(),
        pad(routing_map.sum(1).cumsum(0), (1, 0)).int(),
        routing_map.sum(0).cumsum(0).int(),
    )


def chunk_permutation(
    ends: torch.Tensor, first_expert: int, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four tensors of a permutation of chunks of rows from where each rank's rows of each expert end."""
    sizes = pad(ends, (1, 0)).diff()[:, first_expert : first_expert + num_experts]
    chunks = torch.arange(num_rows, dtype=torch.int32, device=ends.device).split(sizes.flatten().tolist())
    order = torch.arange(sizes.numel()).view(sizes.shape).t().flatten()
    old_rows = torch.cat([chunks[index] for index in order])
    return (
        old_rows,
        old_rows.argsort().int(),
        torch.arange(num_rows + 1, dtype=torch.int32, device=ends.device),
        sizes.sum(0).cumsum(0).int(),
    )


def permute(
    x: torch.Tensor,
    probs: torch.Tensor | None,
    entry_of_row: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [R, H] of the tokens, and their probabilities [R], empty if there are none."""
    return (
        x.index_select(0, entry_of_row // num_experts),
        x.new_empty(0, dtype=torch.float32) if probs is None else probs.flatten().index_select(0, entry_of_row),
    )


def permute_backward(
    grad_rows: torch.Tensor,
    grad_probs: torch.Tensor | None,
    entry_of_row: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x [T, H] and of probs [T, E], the latter empty if there are none."""
    grad_x = unpermute(grad_rows, None, entry_of_row, rows, starts, num_experts)
    if grad_probs is None:
        return grad_x, grad_rows.new_empty(0, dtype=torch.float32)
    dense = grad_probs.new_zeros(grad_x.shape[0] * num_experts)
    return grad_x, dense.index_copy_(0, entry_of_row.long(), grad_probs).view(-1, num_experts)


def unpermute(
    y: torch.Tensor,
    weights: torch.Tensor | None,
    entry_of_row: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_experts: int,
) -> torch.Tensor:
    """Return the sums [T, H] of each token's rows, times their weights, in the order of experts."""
    wide = _widen(y)
    if weights is not None:
        weights = weights.to(wide.dtype).index_select(0, rows)
    sums = embedding_bag(rows, wide, starts, mode="sum", include_last_offset=True, per_sample_weights=weights)
    return sums.to(y.dtype)


def unpermute_backward(
    gradient: torch.Tensor,
    y: torch.Tensor | None,
    weights: torch.Tensor | None,
    entry_of_row: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of y [R, H] and of weights [R], the latter empty (and y not needed) if there are none."""
    of_rows = gradient.index_select(0, entry_of_row // num_experts)
    if weights is None:
        return of_rows, gradient.new_empty(0, dtype=torch.float32)
    assert y is not None
    wide = _widen(of_rows)
    return (wide * weights.unsqueeze(-1)).to(gradient.dtype), (wide * y).sum(-1).to(weights.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
