"""Weights from a provider and low-rank pairs, against products of the full matrices by plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed
from torch.nn.functional import linear

from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    Group,
    ReplicatedLinear,
    RowParallelLinear,
    SectionedColumnParallelLinear,
    column_parallel,
    multiply,
)
from megatron_vlm.layers.moe import Experts
from megatron_vlm.layers.operands import Operand
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.parameters import redeclare, spec_of
from megatron_vlm.parallel.sharding import full_shape, gather_full, own_part
from tests.ranks import run_ranks

HIDDEN, OUT, RANK, SCALE = 24, 16, 4, 0.5
LENGTH, ROWS = 6, 3
TOLERANCE = 1e-5  # fp32; sums in another order reach 1e-6 of the largest value


class Int8:
    """A weight as int8 with one scale per row; counts how often it is asked for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(-1, keepdim=True) / 127
        self.stored = (weight / self.scale).round().to(torch.int8)
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.stored.float() * self.scale


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def fill(module: torch.nn.Module, groups: object) -> dict[str, torch.Tensor]:
    """Set each parameter to its part of values that do not depend on the layout; returns them whole."""
    whole = {}
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        whole[name] = values(*full_shape(parameter, groups), seed=seed + 10)
        with torch.no_grad():
            parameter.copy_(own_part(whole[name], parameter, groups))
    return whole


def gradients(module: torch.nn.Module, groups: object, group: Group) -> dict[str, torch.Tensor]:
    """Each parameter's gradient, whole, partial ones summed as the step does."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        if spec_of(parameter).partial:
            torch.distributed.all_reduce(gradient, group=group)
        found[name] = gather_full(gradient, parameter, groups)
    return found


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


@contextmanager
def kept() -> Iterator[list[torch.Tensor]]:
    """What autograd saves while this is open."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def check_linears(sequence_parallel: bool, provided: bool) -> None:
    """On a rank: all linears with pairs, in one shared product and in a row-parallel one after it."""
    size = torch.distributed.get_world_size()
    layout = Layout.over(size, num_layers=1, tensor_size=size, sequence_parallel=sequence_parallel)
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    config, group = build_mcore_config(HIDDEN, 2, torch.float32, layout), groups.tp
    model = torch.nn.ModuleDict(
        {
            "column": ColumnParallelLinear(HIDDEN, OUT, config, group, bias=True),
            "sections": SectionedColumnParallelLinear(HIDDEN, OUT, 3, config, group),
            "replicated": ReplicatedLinear(HIDDEN, OUT, (0, OUT), config),
            "row": RowParallelLinear(OUT, HIDDEN, config, group, bias=True),
        }
    )
    for module in model.values():
        module.add_low_rank(RANK, SCALE)
    whole = fill(model, groups)
    if provided:
        for name, module in model.items():
            weight = whole[f"{name}.weight"] = Int8(
                whole[f"{name}.weight"]
            )()  # by rows; a row-parallel shard has parts
            part = own_part(weight, module.weight, groups).flatten(0, -2)
            module.provide_weight(lambda part=part: part.clone())

    x = values(LENGTH, ROWS, HIDDEN, seed=1)
    mine = x.chunk(size)[group.rank()] if sequence_parallel else x
    mine = mine.clone().requires_grad_()
    start, rows = group.rank() * OUT // size, OUT // size
    with kept() as saved:
        first, sections = column_parallel(mine, (model["column"], model["sections"]), group, sequence_parallel)
        (some,) = multiply(mine, [model["replicated"]().rows(start, rows)], group, sequence_parallel)
        sections = sections.unflatten(-1, (3, rows))
        inner = first * sections[..., 0, :] * sections[..., 1, :] + sections[..., 2, :] + some
        output = model["row"](inner)
    if provided:
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        sizes = {tensor.numel() for tensor in saved if tensor.data_ptr() not in parameters}
        weights = {HIDDEN * OUT // size, 3 * HIDDEN * OUT // size, HIDDEN * OUT}
        assert not sizes & weights, "a weight is kept"
    gradient = values(LENGTH, ROWS, HIDDEN, seed=2)
    (output * (gradient.chunk(size)[group.rank()] if sequence_parallel else gradient)).sum().backward()
    found = gradients(model, groups, group)

    leaves = {name: value.clone().requires_grad_() for name, value in whole.items()}
    x = x.requires_grad_()

    def full(name: str) -> torch.Tensor:
        pair = leaves[f"{name}.lora_B"].flatten(0, -2) @ leaves[f"{name}.lora_A"]
        return leaves[f"{name}.weight"].flatten(0, -2) + SCALE * pair

    first = linear(x, full("column"), leaves["column.bias"])
    sections = linear(x, full("sections"), leaves["sections.bias"].flatten()).unflatten(-1, (3, OUT))
    inner = first * sections[..., 0, :] * sections[..., 1, :] + sections[..., 2, :] + linear(x, full("replicated"))
    expected = linear(inner, full("row"), leaves["row.bias"])
    (expected * gradient).sum().backward()
    part = (
        slice(group.rank() * LENGTH // size, (group.rank() + 1) * LENGTH // size) if sequence_parallel else slice(None)
    )
    close(output, expected[part])
    close(mine.grad, x.grad[part])
    assert found.keys() == {name for name in leaves if not (provided and name.endswith(".weight"))}
    for name, ours in found.items():
        close(ours, leaves[name].grad)


@pytest.mark.parametrize("provided", [False, True], ids=["trained", "provided"])
@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_linears(world_size: int, sequence_parallel: bool, provided: bool) -> None:
    run_ranks(world_size, check_linears, sequence_parallel, provided)


def check_replicated(provided: bool) -> None:
    """On a rank: pairs on weights that are replicated, where each rank has rows of its own, as with images divided."""
    size = torch.distributed.get_world_size()
    groups = build_groups(Layout.over(size, num_layers=1, tensor_size=size))
    initialize_megatron(1, groups)
    single = build_mcore_config(HIDDEN, 2, torch.float32, Layout.over(1, num_layers=1))
    model = torch.nn.ModuleDict(
        {
            "column": ColumnParallelLinear(HIDDEN, OUT, single, groups.single_rank, bias=True),
            "sections": SectionedColumnParallelLinear(HIDDEN, OUT, 3, single, groups.single_rank),
            "row": RowParallelLinear(HIDDEN, OUT, single, groups.single_rank, bias=True),
        }
    )
    for parameter in model.parameters():  # as ModelChunk.mark_tower does
        redeclare(parameter, tensor_dim=None, partial=True)
    if provided:
        for seed, module in enumerate(model.values()):
            weight = values(*module.weight.flatten(0, -2).shape, seed=seed + 20)
            module.provide_weight(lambda weight=weight: weight.clone())
    for module in model.values():
        module.add_low_rank(RANK, SCALE)
    whole = fill(model, groups)
    x, gradient = (values(size * LENGTH, ROWS, n, seed=seed) for n, seed in ((HIDDEN, 1), (5 * OUT, 2)))
    mine = slice(groups.tp.rank() * LENGTH, (groups.tp.rank() + 1) * LENGTH)
    own_x = x[mine].clone().requires_grad_()
    outputs = multiply(own_x, [model["column"](), model["sections"]()])
    (torch.cat((*outputs, model["row"](own_x)), dim=-1) * gradient[mine]).sum().backward()
    found = gradients(model, groups, groups.tp)

    leaves = {name: value.clone().requires_grad_() for name, value in whole.items()}
    expected = []
    for name, module in model.items():
        weight = module.provider() if provided else leaves[f"{name}.weight"].flatten(0, -2)
        pair = leaves[f"{name}.lora_B"].flatten(0, -2) @ leaves[f"{name}.lora_A"]
        expected.append(linear(x, weight + SCALE * pair, leaves[f"{name}.bias"].flatten()))
    (torch.cat(expected, dim=-1) * gradient).sum().backward()
    assert found.keys() == leaves.keys()
    for name, ours in found.items():
        close(ours, leaves[name].grad)


@pytest.mark.parametrize("provided", [False, True], ids=["trained", "provided"])
def test_replicated(provided: bool) -> None:
    run_ranks(2, check_replicated, provided)


def test_a_provider_is_asked_once_per_pass() -> None:
    weight = Int8(values(OUT, HIDDEN, seed=3))
    x = values(LENGTH, HIDDEN, seed=4).requires_grad_()
    with kept() as saved:
        (output,) = multiply(x, [Operand(weight)])
    assert weight.calls == 1 and not saved, "nothing trains, so nothing is kept"
    output.sum().backward()
    assert weight.calls == 2
    close(x.grad, weight().sum(0).expand_as(x))


WIDTH, COUNTS = 32, [5, 0, 9, 3]


def check_experts(provided: bool) -> None:
    """On a rank: experts that all ranks share, with pairs on both weights."""
    size = torch.distributed.get_world_size()
    layout = Layout.over(size, num_layers=1, tensor_size=size, expert_tensor_size=size)
    groups = build_groups(layout)
    experts = Experts(
        HIDDEN, MoEConfig(len(COUNTS), 2, WIDTH), build_mcore_config(HIDDEN, 2, torch.float32, layout), groups
    )
    for name in ("gate_up_proj", "down_proj"):
        experts.add_low_rank(name, RANK, SCALE)
    whole = fill(experts, groups)
    if provided:
        for name in ("gate_up_proj", "down_proj"):
            part = getattr(experts, name).detach().flatten(1, -2).clone()
            experts.provide_weight(name, lambda part=part: part.clone())
    x = values(sum(COUNTS), HIDDEN, seed=1).requires_grad_()
    scores = torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(2)).requires_grad_()
    with kept() as saved:
        output = experts(x, torch.tensor(COUNTS).cumsum(0).int(), scores)
    if provided:
        weights = {len(COUNTS) * 2 * WIDTH // size * HIDDEN, len(COUNTS) * WIDTH // size * HIDDEN}
        assert not weights & {tensor.numel() for tensor in saved}, "a weight is kept"
    gradient = values(sum(COUNTS), HIDDEN, seed=3)
    (output * gradient).sum().backward()
    torch.distributed.all_reduce(output.detach(), group=groups.expt_tp)
    torch.distributed.all_reduce(x.grad, group=groups.expt_tp)
    found = gradients(experts, groups, groups.expt_tp)

    leaves = {name: value.clone().requires_grad_() for name, value in whole.items()}
    ours, outputs = x, []
    x = x.detach().clone().requires_grad_()
    for expert, (rows, row_scores) in enumerate(zip(x.split(COUNTS), scores.detach().split(COUNTS), strict=True)):
        gate_up, down = (
            leaves[name][expert].flatten(0, -2)
            + SCALE * leaves[f"{name}_lora_B"][expert].flatten(0, -2) @ leaves[f"{name}_lora_A"][expert]
            for name in ("gate_up_proj", "down_proj")
        )
        gate, up = linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(linear(torch.nn.functional.silu(gate) * up * row_scores[:, None], down))
    expected = torch.cat(outputs)
    (expected * gradient).sum().backward()
    close(output.detach(), expected)
    close(ours.grad, x.grad)
    assert found.keys() == {name for name in leaves if not (provided and name in ("gate_up_proj", "down_proj"))}
    for name, value in found.items():
        close(value, leaves[name].grad)


@pytest.mark.parametrize("provided", [False, True], ids=["trained", "provided"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_experts(world_size: int, provided: bool) -> None:
    run_ranks(world_size, check_experts, provided)
