"""A rank's experts by grouped products equal a loop over experts in fp64, experts without tokens included."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import silu

from megatron_vlm.layers.moe import Experts, LocalTokens, MoE, TopKRouter
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config

HIDDEN, WIDTH = 48, 32


@dataclass(frozen=True)
class Record:
    num_experts: int
    top_k: int = 2
    intermediate_size: int = WIDTH
    activation: str = "silu"


COUNTS = {
    "some empty": [5, 0, 9, 0],
    "all to one": [0, 0, 0, 17],
    "first has none": [0, 3, 4, 1],
    "no tokens at all": [0, 0, 0, 0],
}


def check_experts(counts: list[int], device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and all gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(3)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(ep=alone, expt_tp=alone)
    experts = Experts(
        HIDDEN, Record(len(counts)), build_mcore_config(HIDDEN, 1, dtype, Layout.over(1, num_layers=1)), groups
    ).to(device)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x = torch.randn(sum(counts), HIDDEN, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).to(device).requires_grad_()
    gradient = torch.randn(sum(counts), HIDDEN, generator=generator).to(device, dtype)
    output = experts(x, torch.tensor(counts), weights)
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


# fp32 products of 48 terms; bf16 keeps 8 bits, and three roundings lie between input and output.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_experts(counts: list[int], dtype: torch.dtype) -> None:
    check_experts(counts, "cpu", dtype, TOLERANCES[dtype])


def test_a_rank_with_all_experts_never_waits() -> None:
    """Fake tensors have no values: reading one on the host, or a size that depends on one, is an error."""
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(ep=alone, expt_tp=alone, tp_ep=alone)
    chunk = ChunkSettings(
        (0,), 0, True, True, None, build_mcore_config(HIDDEN, 1, torch.bfloat16, Layout.over(1, num_layers=1))
    )
    with FakeTensorMode():
        layer = MoE(HIDDEN, Record(8), TopKRouter(HIDDEN, Record(8), chunk.mcore_config), chunk, groups)
        x_SBH = torch.empty(5, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        is_real = torch.ones(10, dtype=torch.bool)
        output, routing = layer(x_SBH, LocalTokens(is_real, is_real.sum(), None))
        output.float().sum().backward()
        assert x_SBH.grad is not None and x_SBH.grad.shape == output.shape == x_SBH.shape
        assert all(parameter.grad is not None for parameter in layer.parameters())
        with pytest.raises(DataDependentOutputException):
            routing.tokens.sum().item()
