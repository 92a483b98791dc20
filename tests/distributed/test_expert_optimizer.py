"""Norm, clipping and update of a model with experts in every layout, against torch.optim on whole tensors.

Each rank starts from its share of a gradient (tests/checkpoint/tiny_run.py): what follows, from the sums over replicas
to the update, is the training loop's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core.distributed import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.training.optimizer import gradient_norm
from tests.checkpoint.test_distributed_layouts import assert_follows_reference
from tests.checkpoint.tiny_run import Run, Settings, gradient_norm_at
from tests.checkpoint.whole_state import Pieces, assemble
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

STEPS = 2
CLIP = 1.0  # norms are above 40

LAYOUTS = [
    TestLayout(),
    full(TestLayout(4, expert=2)),
    TestLayout(4, expert=2, expert_tensor=2),
    full(TestLayout(4, tensor=2)),
    TestLayout(4, tensor=2, expert=4),
    full(TestLayout(4, tensor=2, expert=2, expert_tensor=2)),
    TestLayout(4, pipeline=2, expert=2),
    TestLayout(4, pipeline=2, tensor=2, expert_tensor=2),
    full(TestLayout(4, pipeline=4)),
]


def train(layout: TestLayout) -> list[tuple[list[float], Pieces]]:
    """With the optimizer whole on each rank, and distributed: norms and tensors."""
    results = []
    for distributed in (False, True):
        run = Run(Settings(layout, distributed_optimizer=distributed, clip_grad=CLIP), "unused")
        run.train(STEPS)
        results.append((run.norms, run.pieces()))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norm_and_clipped_update(layout: TestLayout) -> None:
    for results in zip(*run_ranks(layout.world_size, train, layout), strict=True):
        # A replica counted twice, or a share left out, moves it by 1e-3 or more.
        assert results[0][0] == pytest.approx([gradient_norm_at(step) for step in range(STEPS)], rel=1e-6)
        # Ranks that clip by different factors would drift apart.
        assert all(norms == results[0][0] for norms, _ in results)
        assert_follows_reference(assemble([found for _, found in results]), STEPS, CLIP)


def norms_in_bf16(layout: TestLayout) -> list[list[float]]:
    """With the optimizer whole on each rank, and distributed."""
    found = []
    for distributed in (False, True):
        run = Run(Settings(layout, distributed_optimizer=distributed, bf16=True), "unused")
        run.train(1)
        found.append(run.norms)
    return found


IN_BF16 = [
    TestLayout(2, tensor=2, expert=2),  # one expert-tensor rank, so that each tensor rank has experts of its own
    full(TestLayout(2, expert=2)),
    full(TestLayout(2, tensor=2, expert_tensor=2)),
    full(TestLayout(4, expert=2)),
    TestLayout(4, tensor=2, expert=2, expert_tensor=2),
]


@pytest.mark.parametrize("layout", IN_BF16, ids=str)
def test_norm_in_bf16(layout: TestLayout) -> None:
    """Gradients are fp32, so the norm is the same; what marks a parameter as a shard must reach its fp32 copy."""
    for norms in run_ranks(layout.world_size, norms_in_bf16, layout):
        assert norms == [pytest.approx([gradient_norm_at(0)], rel=1e-6)] * 2


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@dataclass
class Norm:
    """A norm, the operators that computed it, and the number of tensors that it is of."""

    value: float
    operators: list[str]
    tensors: int


def norms_of_one_step(settings: Settings) -> tuple[Norm, Norm]:
    """Ours and megatron-core's own."""
    run = Run(settings, "unused")
    run.compute_gradients()
    norms = []
    for compute in (lambda: gradient_norm(run.optimizer), run.optimizer.get_grad_norm):
        with Operators() as recorded:
            value = float(compute())
        tensors = sum(len(member.get_grads_for_grad_norm()) for member in run.optimizer.chained_optimizers)
        norms.append(Norm(value, recorded.names, tensors))
    ours, theirs = norms
    return ours, theirs


@pytest.mark.parametrize("distributed", [False, True])
def test_the_norm_is_one_operator_and_one_wait(distributed: bool) -> None:
    """megatron-core takes the same norm one tensor at a time, and on CUDA the host waits for each."""
    settings = Settings(TestLayout(2, expert=2), distributed_optimizer=distributed)
    # Without the distributed optimizer, experts and all others are summed over different groups.
    groups = 1 if distributed else 2
    for ours, theirs in run_ranks(2, norms_of_one_step, settings):
        assert ours.value == pytest.approx(theirs.value, rel=1e-7)
        assert ours.operators.count("_foreach_norm") == groups
        assert ours.operators.count("linalg_vector_norm") == groups  # over the norms
        assert ours.operators.count("_local_scalar_dense") == 1
        assert theirs.operators.count("linalg_vector_norm") == theirs.tensors + groups > 10 * groups


def gathers_in_a_step(settings: Settings) -> tuple[int, int]:
    """(gathers of parameters in one step, groups of buckets to gather)."""
    run = Run(settings, "unused")
    groups = [group for chunk in run.chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    gather = DistributedDataParallel._start_bucket_group_param_sync
    with patch.object(
        DistributedDataParallel, "_start_bucket_group_param_sync", autospec=True, side_effect=gather
    ) as spy:
        run.train(1)
    return spy.call_count, len(groups)


def test_parameters_are_gathered_once() -> None:
    """Each of megatron-core's two optimizers would gather the parameters of both."""
    for calls, groups in run_ranks(2, gathers_in_a_step, Settings(TestLayout(2, expert=2))):
        assert calls == groups > 1
