"""Each parameter's declared rule (shard, partial sum over tensor ranks, whole) is the true one, in every layout.

Gradients are taken before `finalize_gradients`: what a rank's own backward pass left, summed over the ranks that hold
copies of the parameter and see other rows (for experts: other tokens), as data parallelism does. Then, for every
parameter, the parts put together, or the sum over tensor ranks, or each rank's own must equal transformers' gradient,
and only the one that the parameter declares may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed
from megatron.core.utils import get_model_config

from megatron_vlm.parallel.gradients import is_partial
from megatron_vlm.parallel.sharding import is_expert, replica_group, splits
from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import (
    GEMMA3,
    GEMMA3_TEXT,
    MISTRAL3,
    QWEN3_VL,
    QWEN3_VL_MOE,
    TOLERANCE,
    ZERO_GRADIENT,
    Subject,
    relative_error,
)
from tests.parity.layouts import LAYOUTS, TestLayout, gather_parameter, own_micro_batches, set_up
from tests.ranks import run_ranks

# Odd numbers of images (a tensor rank of the divided tower gets a blank one), and a micro-batch without any.
CASES: dict[Subject, tuple[str, ...]] = {
    GEMMA3: ("several images", "text", "mixed"),
    GEMMA3_TEXT: ("text",),
    QWEN3_VL: ("image and video", "text", "mixed"),
    MISTRAL3: ("images", "text", "mixed"),
    # Evenly over two data ranks, which have lengths of their own.
    QWEN3_VL_MOE: ("image and video", "text", "mixed", "two images"),
}
EXPERT_LAYOUTS = {
    "TP2+SP, experts whole": TestLayout(2, tensor=2, sequence_parallel=True),
    "EP2 of tensor ranks": TestLayout(2, tensor=2, sequence_parallel=True, expert=2),
    "ETP2xTP2+SP": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "DP2xTP2+SP, EP2": TestLayout(4, tensor=2, sequence_parallel=True, expert=2),
    "EP2 of data ranks": TestLayout(2, expert=2),
}
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


def raw_gradients(hf_dir: str, layout: TestLayout, subject: Subject) -> dict[str, Raw]:
    model, groups = set_up(hf_dir, layout)
    get_model_config(model[0]).finalize_model_grads_func = None
    for chunk in model:
        chunk.zero_grad_buffer()
    run_global_batch(model, own_micro_batches(subject.micro_batches(CASES[subject]), groups, layout), groups)
    found = {}
    for name, parameter in model[0].module.named_parameters():
        alone, replicas = parameter.main_grad.clone(), replica_group(parameter, groups)
        own = alone.clone()
        torch.distributed.all_reduce(own, group=replicas)
        total = own.clone()
        torch.distributed.all_reduce(total, group=groups.tp)
        found[name] = Raw(
            bool(splits(parameter, groups)),
            is_partial(parameter),
            is_expert(parameter),
            replicas.size(),
            gather_parameter(parameter, alone, groups),
            own,
            total,
            gather_parameter(parameter, own, groups),
        )
    return found


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Subject], str]:
    """The directory of a model, written once."""
    written: dict[Subject, str] = {}

    def directory(subject: Subject) -> str:
        if subject not in written:
            written[subject] = subject.write(tmp_path_factory.mktemp("model"))
        return written[subject]

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


def check_every_rule(subject: Subject, hf_dir: str, layout: TestLayout) -> list[dict[str, Raw]]:
    reference = subject.loss_sum_gradients(CASES[subject])
    ranks = run_ranks(layout.world_size, raw_gradients, hf_dir, layout, subject)
    assert all(set(found) == set(reference) for found in ranks)
    for name, gradient in reference.items():
        raw = [found[name] for found in ranks]
        if name.endswith(ZERO_GRADIENT):
            # Other gradients reach 10 here; terms of that size cancel to rounding.
            assert all(part.own.abs().max() <= 1e-5 for part in raw), name
            continue
        check_rule(name, raw, gradient, layout.tensor)
    return ranks


VISION_LAYOUTS = ("TP2", "TP2+SP", "TP4", "TP4+SP", "TP2, vision DP", "TP2+SP, vision DP", "TP4, vision DP")
DENSE_CASES = [
    *((GEMMA3, name) for name in VISION_LAYOUTS),
    *((GEMMA3_TEXT, name) for name in ("TP2", "TP2+SP", "TP4")),
    *((subject, name) for subject in (QWEN3_VL, MISTRAL3) for name in ("TP4+SP", "TP4, vision DP")),
]


@pytest.mark.parametrize(("subject", "layout"), DENSE_CASES, ids=str)
def test_every_parameter_declares_its_rule(hf_dirs: Callable[[Subject], str], subject: Subject, layout: str) -> None:
    ranks = check_every_rule(subject, hf_dirs(subject), LAYOUTS[layout])
    kinds = {(raw.sharded, raw.partial) for raw in ranks[0].values()}
    assert (True, False) in kinds
    assert (False, True) in kinds, "query and key norms act on a rank's own heads"


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_every_parameter_declares_its_rule_with_experts(hf_dirs: Callable[[Subject], str], name: str) -> None:
    """A sum over tensor ranks would count an expert's gradient several times: its tokens have come to it already."""
    layout = EXPERT_LAYOUTS[name]
    ranks = check_every_rule(QWEN3_VL_MOE, hf_dirs(QWEN3_VL_MOE), layout)
    shared = layout.expert * layout.expert_tensor
    for raw in (raw for found in ranks for raw in found.values() if raw.expert):
        assert raw.sharded == (shared > 1)
        assert raw.replicas * shared == layout.world_size
    assert sum(raw.expert for raw in ranks[0].values()) == 2 * 3  # gate-up and down of three layers
