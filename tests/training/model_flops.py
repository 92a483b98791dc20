"""What a test asks of the count of FLOPs."""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from typing import Any

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.registry import Family
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.flops import ModelFlops
from tests.sizes import full

# What does not train, case by case.
FROZEN = [
    set(),
    full({"language_model"}),
    full({"vision_tower"}),
    full({"projector"}),
    full({"language_model", "vision_tower"}),
    full({"language_model", "projector"}),
    {"vision_tower", "projector"},
    full({"language_model", "vision_tower", "projector"}),
]


def batch_flops(family: Family, model_config: Any, batch: MicroBatch, frozen: Set[str] = frozenset()) -> float:
    """FLOPs of a micro-batch, forward and backward, with the named parts frozen."""
    flops = _model_flops(family, model_config, frozenset(frozen))
    return flops.of(flops.lengths(batch))


@cache
def _model_flops(family: Family, model_config: Any, frozen: frozenset[str]) -> ModelFlops:
    with simulated_rank(0, Layout()) as groups:
        flops = ModelFlops(family, model_config, Trainable(frozen), groups)
        assert flops.factors  # which are there from now on
    return flops
