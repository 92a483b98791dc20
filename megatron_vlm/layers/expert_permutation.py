"""This module gives megatron-core's token dispatchers the permutation kernels of this project.

The dispatchers call three functions of megatron-core: plain PyTorch (a sort of all choices, sums by scattered
additions, a list of views for chunks), or Transformer Engine's kernels where it is installed and the settings ask for
it. This module replaces the three names where the dispatchers look them up. It can be removed when megatron-core takes
such functions as arguments.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vlm_kernels import permute as operators


def permute(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None = None,
    num_out_tokens: Any = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    tokens_per_expert: torch.Tensor | None = None,
    align_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, operators.Permutation, None, torch.Tensor | None]:
    """Return the rows of each expert, their probabilities, and the permutation for `unpermute`; dropless only."""
    assert num_out_tokens is not None and not drop_and_pad and not align_size
    permutation = operators.expert_permutation(routing_map, int(num_out_tokens))
    rows, row_probs = operators.permute(tokens, permutation, probs)
    return rows, row_probs, permutation, None, tokens_per_expert


def unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: operators.Permutation,
    restore_shape: torch.Size,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    pad_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of each token's rows."""
    assert not drop_and_pad and pad_offsets is None and probs is None, "rows were weighted by the experts"
    return operators.unpermute(permuted_tokens, sorted_indices)


def sort_chunks_by_idxs(
    input: torch.Tensor,
    split_sizes: torch.Tensor,
    sorted_idxs: torch.Tensor,
    probs: torch.Tensor | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return chunks of rows in another order, and the rows' probabilities [R]."""
    permutation = operators.chunk_permutation(split_sizes, sorted_idxs, input.shape[0], input.device)
    return operators.permute(input, permutation, None if probs is None else probs.unsqueeze(-1))


@cache
def install() -> None:
    """Make the dispatchers call these functions from now on; later calls do nothing, so a test's replacements stay."""
    from megatron.core.transformer.moe import token_dispatcher

    for function in (permute, unpermute, sort_chunks_by_idxs):
        assert hasattr(token_dispatcher, function.__name__)
        setattr(token_dispatcher, function.__name__, function)
