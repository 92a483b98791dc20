"""A rank's experts by grouped products equal a loop over experts in fp64, experts without tokens included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import gelu, silu

from megatron_vlm.layers.load_balancing import LoadBalancing
from megatron_vlm.layers.moe import Experts, LocalTokens, MoE, Routing, TopKRouter
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config

HIDDEN, WIDTH = 48, 32


COUNTS = {
    "some empty": [5, 0, 9, 0],
    "all to one": [0, 0, 0, 17],
    "first has none": [0, 3, 4, 1],
    "no tokens at all": [0, 0, 0, 0],
}


def build_single_rank() -> Any:
    single = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(ep=single, expt_tp=single, tp_ep=single)


def check_experts(counts: list[int], device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and all gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(3)
    groups = build_single_rank()
    experts = Experts(
        HIDDEN,
        MoEConfig(len(counts), 2, WIDTH),
        build_mcore_config(HIDDEN, 1, dtype, Layout.over(1, num_layers=1)),
        groups,
    ).to(device)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x = torch.randn(sum(counts), HIDDEN, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).to(device).requires_grad_()
    gradient = torch.randn(sum(counts), HIDDEN, generator=generator).to(device, dtype)
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    output = experts(x, ends, weights)
    inputs = [x, weights, experts.gate_up_proj, experts.down_proj]
    ours = [output, *torch.autograd.grad(output, inputs, gradient)]

    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    parts = []
    for expert, (rows, factors) in enumerate(zip(wide[0].split(counts), wide[1].split(counts), strict=True)):
        gate, up = (rows @ section.T for section in wide[2][expert])
        parts.append(factors[:, None] * (silu(gate) * up @ wide[3][expert].T))
    expected = torch.cat(parts)
    theirs = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    for own, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(own).all()
        if other.numel():
            assert (own.double() - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-12)
    for expert, count in enumerate(counts):
        if not count:
            assert not ours[3][expert].any() and not ours[4][expert].any(), "an expert without tokens has gradients"
    check_main_gradients(experts, (x, ends, weights), gradient, theirs[3:], tolerance)


def check_main_gradients(
    experts: Experts, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor, expected: Any, tolerance: float
) -> None:
    """What is added to megatron-core's gradients, which hold others already; nothing for experts without tokens."""
    parameters = list(experts.parameters())
    for parameter in parameters:
        parameter.main_grad = torch.ones(parameter.shape, device=parameter.device)
        parameter.grad_added_to_main_grad = False
    experts(*inputs).backward(gradient)
    for parameter, other in zip(parameters, expected, strict=True):
        added = parameter.main_grad.double() - 1
        assert parameter.grad_added_to_main_grad
        # Ones round the sum to their own last bit.
        assert (added - other).abs().max() <= tolerance * other.abs().max() + 2e-7 * (1 + other.abs().max())
        assert not added[(other == 0).flatten(1).all(1)].any(), "an expert without tokens has gradients"


# fp32 products of 48 terms; bf16 keeps 8 bits, and three roundings lie between input and output.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_experts(counts: list[int], dtype: torch.dtype) -> None:
    check_experts(counts, "cpu", dtype, TOLERANCES[dtype])


class FirstTwoRouter(torch.nn.Module):
    """Sends every token to the two experts with the largest of the first four inputs, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.5, 1.5, 2.0, 3.0]))

    def forward(self, x_TH: torch.Tensor, is_real_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        scores = x_TH[:, :4] * self.scale
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, x_TH[:, :4].topk(2).indices, True)
        counted = chosen[is_real_T].float().sum(0)
        return scores * chosen, chosen, Routing(counted, counted)


def test_a_router_and_an_input_of_its_own() -> None:
    """Experts compute with one input, the router chooses by another; both receive their gradients."""
    config = MoEConfig(4, 2, WIDTH, activation="gelu_tanh")
    groups = build_single_rank()
    chunk = ChunkSettings(
        (0,), 0, True, True, None, build_mcore_config(HIDDEN, 1, torch.float32, Layout.over(1, num_layers=1))
    )
    layer = MoE(HIDDEN, config, FirstTwoRouter(), chunk, groups)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / HIDDEN**0.5)
    x_SBH, seen_SBH = (torch.randn(6, 2, HIDDEN, generator=generator).requires_grad_() for _ in range(2))
    is_real = torch.arange(12) < 9
    output, routing = layer(x_SBH, LocalTokens(is_real, is_real.sum(), None), router_input=seen_SBH)
    inputs = [x_SBH, seen_SBH, layer.gate.scale, layer.experts.gate_up_proj, layer.experts.down_proj]
    gradient = torch.randn(output.shape, generator=generator)
    ours = [output, *torch.autograd.grad(output, inputs, gradient)]

    x, seen, scale, gate_up, down = wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    tokens = []
    for x_H, seen_H in zip(x.flatten(0, 1), seen.flatten(0, 1), strict=True):
        chosen = seen_H[:4].topk(2).indices
        terms = []
        for expert in chosen:
            hidden = gelu(gate_up[expert, 0] @ x_H, approximate="tanh") * (gate_up[expert, 1] @ x_H)
            terms.append(seen_H[expert] * scale[expert] * (down[expert] @ hidden))
        tokens.append(sum(terms))
    expected = torch.stack(tokens).view_as(x)
    theirs = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    for own, other in zip(ours, theirs, strict=True):
        assert (own.double() - other).abs().max() <= 5e-6 * other.abs().max()
    assert routing.tokens.sum() == 18


def test_a_rank_with_all_experts_never_waits() -> None:
    """Fake tensors have no values: reading one on the host, or a size that depends on one, is an error."""
    groups = build_single_rank()
    chunk = ChunkSettings(
        (0,), 0, True, True, None, build_mcore_config(HIDDEN, 1, torch.bfloat16, Layout.over(1, num_layers=1))
    )
    with FakeTensorMode():
        layer = MoE(
            HIDDEN,
            MoEConfig(8, 2, WIDTH),
            TopKRouter(HIDDEN, MoEConfig(8, 2, WIDTH), chunk.mcore_config),
            chunk,
            groups,
        )
        x_SBH = torch.empty(5, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        is_real = torch.ones(10, dtype=torch.bool)
        output, routing = layer(x_SBH, LocalTokens(is_real, is_real.sum(), None))
        output.float().sum().backward()
        assert x_SBH.grad is not None and x_SBH.grad.shape == output.shape == x_SBH.shape
        assert all(parameter.grad is not None for parameter in layer.parameters())
        with pytest.raises(DataDependentOutputException):
            routing.tokens.sum().item()


def test_a_rank_with_all_tokens_exchanges_nothing_to_balance() -> None:
    """There is no process group here."""
    single = build_single_rank().ep
    routing = Routing(torch.tensor([3.0, 1.0]), torch.tensor([2.5, 1.5]))
    of_layer = LoadBalancing("megatron", 0.1, 1, 2, 1, single, single).of_layer(routing, torch.tensor(4))
    assert of_layer.item() == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
