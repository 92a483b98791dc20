"""Gradient rules of replicated parameters, in one place.

A parameter that every tensor rank holds whole has a whole gradient if the rank's activations are whole, and a partial
one if they are a share: heads (query and key norms), sequence (norms under sequence parallelism), or images (vision
tower in data mode). Partial gradients are summed over the tensor ranks once per step. Shards (`tensor_model_parallel`)
need nothing. tests/parity proves the rule of every parameter by comparing its gradient across layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed
from megatron.core.distributed.finalize_model_grads import finalize_model_grads as megatron_finalize
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_BUCKET_BYTES = 64 * 2**20


def mark_partial(parameters: Iterable[torch.nn.Parameter], partial: bool = True) -> None:
    """Declare that the gradients are sums over the tensor ranks (`partial` false: leave them as they are)."""
    for parameter in parameters:
        parameter.partial_over_tensor_ranks = partial  # type: ignore[attr-defined]


def is_partial(parameter: torch.nn.Parameter) -> bool:
    """Whether the gradient must be summed over the tensor ranks."""
    return getattr(parameter, "partial_over_tensor_ranks", False)


def finalize_gradients(
    model: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool | None = False,
) -> None:
    """megatron-core's `finalize_model_grads` (data ranks, tied embeddings, division by tokens), then our rule."""
    assert pg_collection is not None
    megatron_finalize(list(model), num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    if pg_collection.tp.size() > 1:
        gradients = [
            gradient
            for chunk in model
            for parameter in chunk.parameters()
            if parameter.requires_grad and is_partial(parameter) and (gradient := _main_gradient(parameter)) is not None
        ]
        _in_buckets(gradients, lambda flat: torch.distributed.all_reduce(flat, group=pg_collection.tp))


def _main_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    return getattr(parameter, "main_grad", parameter.grad)


def _in_buckets(tensors: Sequence[torch.Tensor], reduce: Callable[[torch.Tensor], object]) -> None:
    """Apply an in-place collective to many tensors, joined into messages of limited size."""
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index == len(tensors) - 1 or sum(part.nbytes for part in bucket) >= _BUCKET_BYTES:
            flat = _flatten_dense_tensors(bucket)
            reduce(flat)
            for part, reduced in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                part.copy_(reduced)
            bucket = []
