"""Each parameter's declared rule (shard, partial sum over tensor ranks, whole) is the true one, in every layout.

Gradients are taken before `finalize_gradients`: what a rank's own backward pass left, summed over the ranks that hold
copies of the parameter and see other rows (for experts: other tokens), as data parallelism does. Then, for every
parameter, the parts put together, or the sum over tensor ranks, or each rank's own must equal transformers' gradient,
and only the one that the parameter declares may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed
from megatron.core.utils import get_model_config

from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import replica_group, splits
from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import TOLERANCE, loss_sum_gradients, micro_batches, relative_error
from tests.families.parameters import each_layout
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import ZERO_GRADIENT
from tests.parity.layouts import TestLayout, gather_parameter, own_micro_batches, set_up
from tests.ranks import run_ranks

# Where a rule does not hold, some value is off by far more than rounding: each rank adds its own heads, places, images.
CLEARLY_WRONG = 1e-2


@dataclass
class Raw:
    """One parameter on one rank: its rule, and its gradient over the replicas, by itself, summed, or put together.

    Attributes:
        rank_alone: before the sum over replicas.
        replicas: how many.
    """

    sharded: bool
    partial: bool
    expert: bool
    replicas: int
    rank_alone: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor
    whole: torch.Tensor


def cases_of(family: TinyFamily) -> tuple[str, ...]:
    """All, and evenly over two data ranks."""
    names = tuple(family.cases)
    return names + names[-1:] * (len(names) % 2)


def raw_gradients(hf_dir: str, layout: TestLayout, family: TinyFamily) -> dict[str, Raw]:
    model, groups = set_up(hf_dir, layout)
    get_model_config(model[0]).finalize_model_grads_func = None
    for chunk in model:
        chunk.zero_grad_buffer()
    run_global_batch(model, own_micro_batches(model, micro_batches(family, cases_of(family)), groups, layout), groups)
    found = {}
    for name, parameter in model[0].module.named_parameters():
        if not parameter.requires_grad:
            continue
        alone, replicas = parameter.main_grad.clone(), replica_group(parameter, groups)
        own = alone.clone()
        torch.distributed.all_reduce(own, group=replicas)
        total = own.clone()
        torch.distributed.all_reduce(total, group=groups.tp)
        found[name] = Raw(
            bool(splits(parameter, groups)),
            spec_of(parameter).partial,
            spec_of(parameter).is_expert,
            replicas.size(),
            gather_parameter(parameter, alone, groups),
            own,
            total,
            gather_parameter(parameter, own, groups),
        )
    return found


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], str]:
    """The directory of a model, written once."""

    @cache
    def directory(family: TinyFamily) -> str:
        return family.write(tmp_path_factory.mktemp("model"))

    return directory


def check_rule(name: str, ranks: list[Raw], reference: torch.Tensor, tensor_size: int) -> None:
    first = ranks[0]
    assert all((raw.sharded, raw.partial) == (first.sharded, first.partial) for raw in ranks)
    if first.sharded or first.expert:
        assert not first.partial, f"{name} is a shard, whose gradient is whole"
        for raw in ranks:
            assert relative_error(raw.whole, reference) <= TOLERANCE, f"{name} is not a shard along its dimensions"
            if raw.expert and raw.replicas > 1:
                assert relative_error(raw.rank_alone, reference) >= CLEARLY_WRONG, f"{name} is not shared by replicas"
        return
    own = max(relative_error(raw.own, reference) for raw in ranks)
    total = relative_error(first.total, reference)
    right, wrong = (total, own) if first.partial else (own, total)
    rule = "summed over tensor ranks" if first.partial else "left as it is on each rank"
    assert right <= TOLERANCE, f"{name} is {rule}, which is off by {right:.1e} (the other rule: {wrong:.1e})"
    assert wrong >= CLEARLY_WRONG or tensor_size == 1, f"{name}: the test cannot tell its two rules apart"


@pytest.mark.parametrize(("family", "name"), each_layout("rules"))
def test_every_parameter_declares_its_rule(hf_dirs: Callable[[TinyFamily], str], family: TinyFamily, name: str) -> None:
    """A sum over tensor ranks would count an expert's gradient several times: its tokens have come to it already."""
    layout, reference = family.tables.rules[name], loss_sum_gradients(family, cases_of(family))
    ranks = run_ranks(layout.world_size, raw_gradients, hf_dirs(family), layout, family)
    assert all(set(found) == set(reference) for found in ranks)
    for parameter, gradient in reference.items():
        raw = [found[parameter] for found in ranks]
        if parameter.endswith(ZERO_GRADIENT):
            # Other gradients reach 10 here; terms of that size cancel to rounding.
            assert all(part.own.abs().max() <= 1e-5 for part in raw), parameter
            continue
        check_rule(parameter, raw, gradient, layout.tensor)
    kinds = {(raw.sharded, raw.partial) for raw in ranks[0].values()}
    if layout.tensor > 1:
        assert (True, False) in kinds
        has_query_norms = any(parameter.endswith("q_norm.weight") for parameter in reference)
        if layout.sequence_parallel or layout.vision == "data" or has_query_norms:
            assert (False, True) in kinds, "norms act on a rank's own places or heads, towers on its own images"
    shared = layout.expert * layout.expert_tensor
    for raw in (raw for found in ranks for raw in found.values() if raw.expert):
        assert raw.sharded == (shared > 1)
        assert raw.replicas * shared == layout.world_size
    num_experts = sum(".experts." in parameter for parameter in reference)
    assert sum(raw.expert for raw in ranks[0].values()) == num_experts
    assert num_experts or shared == 1
