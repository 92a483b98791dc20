"""What all ranks hold of a model and its optimizer, put together and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.checkpoint import optimizer_state
from megatron_vlm.checkpoint.manager import sharded_model_state

Pieces = list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]
"""(key, global shape, place, values) of tensors in a checkpoint."""


def pieces(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, groups: ProcessGroupCollection) -> Pieces:
    """Every tensor that this rank would save, replicas included."""
    model = sharded_model_state(chunks, groups)
    tree = [model, optimizer_state.sharded_state(optimizer, model, is_loading=False)]
    found = [leaf for leaf in nested_values(tree) if isinstance(leaf, ShardedTensor)]
    places = [
        tuple(slice(o, o + n) for o, n in zip(leaf.global_offset, leaf.local_shape, strict=True)) for leaf in found
    ]
    return [
        (leaf.key, tuple(leaf.global_shape), place, leaf.data.detach().clone())
        for leaf, place in zip(found, places, strict=True)
    ]


def assemble(pieces_of_ranks: Sequence[Pieces]) -> dict[str, torch.Tensor]:
    """Whole tensors by key; every element is covered, and replicas agree bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, place, values in (piece for rank in pieces_of_ranks for piece in rank):
        tensor = whole.setdefault(key, torch.full(shape, math.nan, dtype=values.dtype))
        covered = ~tensor[place].isnan()
        assert torch.equal(tensor[place][covered], values[covered]), f"replicas of {key} differ"
        tensor[place] = values
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key} is not covered"
    return whole


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key
