"""Products of weights that lie side by side, and gradients that they add to main gradients, under data parallelism."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.utils.checkpoint import checkpoint

from megatron_vlm import platform
from megatron_vlm.families.build import wrap_data_parallel
from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    SectionedColumnParallelLinear,
    column_parallel,
    multiply,
)
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.operands import Operand
from megatron_vlm.layers.side_by_side import add_side_by_side, lay_side_by_side, runs
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.recorder import Counts
from megatron_vlm.planning.stages import trace_stages
from tests.ranks import run_ranks
from tests.training.test_memory import LENGTH as TOKENS
from tests.training.test_memory import family_of, model_config_of, run_config

HIDDEN, WIDE, LENGTH, RANK = 64, 128, 12, 4
ALONE = Layout.over(1, num_layers=1)


class Linears(MegatronModule):
    """Every linear layer: in a group, with pairs, in sections, in part, twice in a pass, after the others."""

    q_proj: ColumnParallelLinear
    k_proj: ColumnParallelLinear

    def __init__(self, dtype: torch.dtype, groups: ProcessGroupCollection) -> None:
        config, group = build_mcore_config(HIDDEN, 2, dtype, ALONE), groups.tp
        super().__init__(config)
        self.group = group
        q, k = (ColumnParallelLinear(HIDDEN, HIDDEN, config, group) for _ in range(2))
        add_side_by_side(self, q_proj=q, k_proj=k)
        self.sections = SectionedColumnParallelLinear(HIDDEN, HIDDEN, 3, config, group)
        self.replicated = ReplicatedLinear(HIDDEN, 2 * HIDDEN, (HIDDEN // 2, HIDDEN), config)
        self.paired = ColumnParallelLinear(HIDDEN, HIDDEN, config, group)
        self.paired.add_low_rank(RANK, 0.5)
        self.row = RowParallelLinear(HIDDEN, HIDDEN, config, group)
        self.mlp = GatedMLP(HIDDEN, WIDE, "silu", config, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linears = (self.q_proj, self.k_proj, self.sections, self.replicated, self.paired)
        q, k, sections, replicated, paired = column_parallel(x, linears, self.group, False)
        first, second, third = sections.chunk(3, dim=-1)
        return self.mlp(self.row(self.row(q * k + first * second + third) + replicated) + paired)


def linears(dtype: torch.dtype, groups: ProcessGroupCollection, frozen: str | None = None) -> Linears:
    model = Linears(dtype, groups)
    for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parameter.data.copy_(values / HIDDEN**0.5)
        parameter.requires_grad_(name != frozen)
    return model


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(LENGTH, 2, HIDDEN, generator=generator).to(dtype) for _ in range(2)]


def check_main_gradients(dtype: torch.dtype, distributed_optimizer: bool, frozen: str | None, recompute: bool) -> None:
    """On a rank: two micro-batches, against autograd's own sums in fp64 of a model that no data parallelism holds."""
    groups = build_groups(ALONE)
    initialize_megatron(1, groups)
    (wrapped,) = wrap_data_parallel([linears(dtype, groups, frozen)], groups, distributed_optimizer)
    model, exact, plain = wrapped.module, linears(torch.float64, groups, frozen), linears(dtype, groups, frozen)
    for own, other in zip(model.parameters(), exact.parameters(), strict=True):
        other.data.copy_(own.data)
    wrapped.zero_grad_buffer()
    for x in inputs(dtype):
        if recompute:
            checkpoint(wrapped, x.requires_grad_(), use_reentrant=False).sum().backward()
        else:
            wrapped(x).sum().backward()
        plain(x).sum().backward()
        exact(x.double()).sum().backward()
    for (name, own), other, without in zip(
        model.named_parameters(), exact.parameters(), plain.parameters(), strict=True
    ):
        assert own.requires_grad == (name != frozen) and own.grad is None
        if name == frozen:
            continue
        is_added = own.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert is_added == ("bias" not in name)
        largest, error = other.grad.abs().max(), (own.main_grad.double() - other.grad).abs().max()
        if dtype == torch.float32:
            assert error <= 1e-5 * largest, name
        else:
            # Products that are not rounded are as close as those that are, or closer.
            assert error <= 1.1 * (without.grad.double() - other.grad).abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize(
    ("distributed_optimizer", "frozen", "recompute"),
    [(False, None, False), (True, None, True), (True, "k_proj.weight", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_main_gradients(
    dtype: torch.dtype, distributed_optimizer: bool, frozen: str | None, recompute: bool
) -> None:
    run_ranks(1, check_main_gradients, dtype, distributed_optimizer, frozen, recompute)


def runs_of_groups(distributed_optimizer: bool, overlap: bool) -> list[int]:
    groups = build_groups(Layout.over(2, num_layers=1))
    initialize_megatron(1, groups)
    (wrapped,) = wrap_data_parallel([linears(torch.bfloat16, groups)], groups, distributed_optimizer, overlap, overlap)
    model = wrapped.module
    found = []
    for weights in (
        [model.q_proj.weight, model.k_proj.weight],
        [model.mlp.gate_proj.weight, model.mlp.up_proj.weight],
    ):
        found += [len(list(runs(weights))), len(list(runs([weight.main_grad for weight in weights])))]
    return found


@pytest.mark.parametrize(("distributed_optimizer", "overlap"), [(False, False), (True, False), (True, True)])
def test_data_parallelism_keeps_weights_and_gradients_side_by_side(distributed_optimizer: bool, overlap: bool) -> None:
    assert run_ranks(2, runs_of_groups, distributed_optimizer, overlap) == [[1, 1, 1, 1]] * 2


def test_runs() -> None:
    """Matrices of one storage in its order are one; a gap, another order, a transposed or a missing one ends a run."""
    storage = torch.arange(60.0)
    first, second, third = (storage[start : start + 12].view(-1, 3) for start in (0, 12, 27))
    (run,) = runs([first, second])
    assert (run.first, run.last) == (0, 2) and torch.equal(run.matrix, storage[:24].view(8, 3))
    for matrices in ([first, third], [second, first], [first, storage[12:21].view(3, 3).t()], [first, second.clone()]):
        assert [run[:2] for run in runs(matrices)] == [(0, 1), (1, 2)]
    assert [run[:2] for run in runs([first, None, second])] == [(0, 1), (2, 3)]


def check_released(groups: ProcessGroupCollection) -> None:
    model = linears(torch.float32, groups, frozen="k_proj.weight")
    lay_side_by_side(model)
    q, k = model.q_proj.weight, model.k_proj.weight
    assert q.untyped_storage().nbytes() == q.nbytes and k.untyped_storage().nbytes() == k.nbytes
    values, x = k.detach().clone(), inputs(torch.float32)[0]
    before = multiply(x, [model.k_proj()])[0]
    model.k_proj.provide_weight(lambda: values)
    lay_side_by_side(model)
    assert torch.equal(multiply(x, [model.q_proj(), model.k_proj()])[1], before)


def released() -> None:
    groups = build_groups(ALONE)
    initialize_megatron(1, groups)
    check_released(groups)


def test_a_weight_that_is_frozen_or_released_shares_no_memory_with_one_that_trains() -> None:
    run_ranks(1, released)


def test_no_rows() -> None:
    """As of a rank without a token of an expert or an image."""
    weights = [torch.ones(WIDE, HIDDEN, requires_grad=True) for _ in range(2)]
    x = torch.ones(0, 2, HIDDEN, requires_grad=True)
    outputs = multiply(x, [Operand(weight) for weight in weights])
    sum(output.sum() for output in outputs).backward()
    assert [output.shape for output in outputs] == [(0, 2, WIDE)] * 2
    assert x.grad.shape == x.shape and not any(weight.grad.any() for weight in weights)


def products(counts: Counts, phase: str) -> tuple[int, int]:
    """Launches of matmuls in a phase, and the bytes that they move."""
    operations = [each for each in counts.operations.items() if each[0].phase == phase and each[0].kind == "matmul"]
    return sum(times for _, times in operations), sum(times * operation.moved_bytes for operation, times in operations)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "mistral3"])
def test_products_of_a_dense_layer(name: str) -> None:
    """Queries, keys and values are one, and so are gate and up; gradients of weights are read and written in fp32."""
    platform.initialize()
    config, model_config = run_config(), model_config_of(name)
    layout = check_layout(config, model_config, 1)
    (stage,) = trace_stages(config, family_of(name), model_config, layout, images_per_row=1)
    layer = stage.chunks[0].layers[0]
    sizes = [(1536, 512), (512, 1024), (2048, 512), (512, 1024)]  # outputs and inputs
    tensors = sum(2 * (TOKENS * outputs + TOKENS * inputs) for outputs, inputs in sizes)
    weights = sum(outputs * inputs for outputs, inputs in sizes)
    assert products(layer, "forward") == (4, tensors + 2 * weights)
    assert products(layer, "backward") == (8, 2 * tensors + (2 + 8) * weights)
