"""The sums of gradients that megatron-core does not make, in one place.

A parameter that is replicated over the tensor ranks has a full gradient if each rank's activations are unsharded, and a
partial one if they cover only some of the heads (query and key norms), of the sequence (norms under sequence
parallelism), or of the images (vision tower in data mode): `ParameterSpec.partial`. A parameter of which several stages
hold a copy (a tied embedding) has a part of its gradient on each: `ParameterSpec.stages`. Both are summed once per
step; nothing else needs a rule. tests/parity checks this for every parameter by comparing its gradient across layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed
from megatron.core.distributed.finalize_model_grads import finalize_model_grads as megatron_finalize
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_vlm.parallel.parameters import spec_of

_BUCKET_BYTES = 64 * 2**20


def finalize_gradients(
    model: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool | None = False,
) -> None:
    """Run megatron-core's `finalize_model_grads` (sum over data ranks, division by tokens), then our sums."""
    assert pg_collection is not None
    megatron_finalize(list(model), num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    sum_parts(model, pg_collection)


def sum_parts(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """Sum partial gradients over tensor ranks, and those of copies over pipeline ranks."""
    partial: list[torch.Tensor] = []
    partial_of_experts: list[torch.Tensor] = []
    copies: dict[str, dict[str, list[torch.Tensor]]] = {"embedding_and_head": {}, "all": {}}
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if not parameter.requires_grad or gradient is None:
                continue
            spec = spec_of(parameter, name)
            if spec.partial:
                (partial_of_experts if spec.is_expert else partial).append(gradient)
            if spec.stages != "one":
                copies[spec.stages].setdefault(name, []).append(gradient)
    _sum(partial, groups.tp)
    _sum(partial_of_experts, groups.expt_tp)
    _sum_copies(copies["embedding_and_head"], groups.embd)
    _sum_copies(copies["all"], groups.pp)


def _sum_copies(gradients: Mapping[str, list[torch.Tensor]], group: torch.distributed.ProcessGroup | None) -> None:
    """Sum the gradients of copies in place; a rank with several chunks may hold several copies.

    Args:
        gradients: gradients of the copies, by the parameter's name.
        group: process group of the pipeline ranks that hold copies; None on a rank that holds none.
    """
    for first, *others in gradients.values():
        for other in others:
            first += other
    _sum([first for first, *_ in gradients.values()], group)
    for first, *others in gradients.values():
        for other in others:
            other.copy_(first)


def _sum(gradients: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        _in_buckets(gradients, lambda flat: torch.distributed.all_reduce(flat, group=group))


def _in_buckets(tensors: Sequence[torch.Tensor], reduce: Callable[[torch.Tensor], object]) -> None:
    """Apply an in-place collective to many tensors, joined into messages of limited size."""
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index == len(tensors) - 1 or sum(part.nbytes for part in bucket) >= _BUCKET_BYTES:
            if len(bucket) == 1:  # it may be large (a tied embedding), so it is not copied
                reduce(tensor)
            else:
                flat = _flatten_dense_tensors(bucket)
                reduce(flat)
                for part, reduced in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                    part.copy_(reduced)
            bucket = []
