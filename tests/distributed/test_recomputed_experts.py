"""A recomputed layer takes the experts that its first pass chose, though logits differ between the passes.

Logits have near ties, and in recomputation what a sum in another order may leave in their last bits, enlarged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.families.gemma4.moe import Router
from megatron_vlm.layers import moe
from megatron_vlm.layers.moe import LocalTokens, MoE, TopKRouter
from megatron_vlm.layers.recompute import decided, run_layer
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings, MoESettings
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.sharding import full_shape, own_part
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

HIDDEN, EXPERTS = 16, 8
CONFIG = MoEConfig(EXPERTS, 3, 8)
EXACT_LOGITS = moe._RouterLogits.apply
PERTURBATION = 1e-5
# Gradients change by the perturbation times a slope; another choice changes them by their own size.
TOLERANCE = 1e-4
ROUTERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "softmax": lambda settings: TopKRouter(HIDDEN, CONFIG, settings),
    "gemma4": lambda settings: Router(HIDDEN, CONFIG, 1e-6, settings),
}


def is_recomputed() -> bool:
    """Whether autograd runs, which no first pass does within."""
    return torch._C._current_graph_task_id() != -1


def perturbed_logits(x_TH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = EXACT_LOGITS(x_TH, weight)
    if not is_recomputed():
        return logits
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    return logits + PERTURBATION * noise.sign()


def build_layer(layout: TestLayout, kind: str, dispatcher: Any, groups: Any) -> tuple[MoE, ChunkSettings]:
    settings = build_mcore_config(HIDDEN, 4, torch.float32, layout.ranks(num_layers=1))
    chunk = ChunkSettings((0,), 0, True, True, None, settings, moe=MoESettings(dispatcher))
    layer = MoE(HIDDEN, CONFIG, ROUTERS[kind](settings), chunk, groups)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in layer.named_parameters():
        whole = torch.randn(full_shape(parameter, groups), generator=generator) / HIDDEN**0.5
        if name in ("gate.weight", "gate.proj.weight"):
            whole[1::2] = whole[::2] + 1e-8  # pairs of experts that are alike: of three choices one is a near tie
        with torch.no_grad():
            parameter.copy_(own_part(whole, parameter, groups))
    return layer, chunk


def run_layers(
    layout: TestLayout, kind: str, dispatcher: str, perturbed: bool, repeats: bool = True
) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]]]:
    """On a rank: gradients of two micro-batches in flight, and the rows of experts in either pass."""
    groups = build_groups(layout.ranks())
    initialize_megatron(1, groups)
    layer, chunk = build_layer(layout, kind, dispatcher, groups)
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows[is_recomputed()].append(inputs[1].tolist()))
    generator = torch.Generator().manual_seed(3 + groups.dp.rank())
    batches = [torch.randn(24, 1, HIDDEN, generator=generator) for _ in range(2)]
    inputs = [batch.chunk(groups.tp.size())[groups.tp.rank()].clone().requires_grad_() for batch in batches]
    tokens = LocalTokens.of(torch.zeros(1, 24, dtype=torch.int32), chunk, groups)
    function = perturbed_logits if perturbed else EXACT_LOGITS
    with (
        mock.patch.object(moe, "_RouterLogits", mock.Mock(apply=function)),
        mock.patch.object(moe, "decided", decided if repeats else lambda decide: decide()),
    ):
        outputs = [run_layer(layer.train(), x, tokens, recompute=True) for x in inputs]
        for output, routing in reversed(outputs):  # as an interleaved schedule may
            (output.sin().sum() + routing.probabilities.square().sum()).backward()
        with torch.no_grad():
            run_layer(layer.eval(), inputs[0], tokens, recompute=True)
    assert rows[0].pop() == rows[0][0], "evaluation decides anew"
    gradients = [tensor.grad for tensor in (*inputs, *layer.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return gradients, rows[0], rows[1][::-1]  # type: ignore[return-value]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ROUTERS)
def test_choices_are_those_of_the_first_pass(kind: str) -> None:
    (expected,) = run_ranks(1, run_layers, TestLayout(), kind, "alltoall", False)
    (found,) = run_ranks(1, run_layers, TestLayout(), kind, "alltoall", True)
    assert found[1] == found[2] == expected[1]
    assert 0 < error(found[0], expected[0]) < TOLERANCE, "not perturbed, or too much"
    (without,) = run_ranks(1, run_layers, TestLayout(), kind, "alltoall", True, False)
    assert without[2] != expected[1] and error(without[0], expected[0]) > 100 * TOLERANCE, "nothing to mend"


@pytest.mark.parametrize("dispatcher", ["alltoall", full("allgather")])
@pytest.mark.parametrize("kind", ["softmax", full("gemma4")])
def test_ranks_exchange_the_same_rows(kind: str, dispatcher: str) -> None:
    layout = TestLayout(4, tensor=2, expert=2, sequence_parallel=True, expert_tensor=2)
    expected = run_ranks(4, run_layers, layout, kind, dispatcher, False)
    found = run_ranks(4, run_layers, layout, kind, dispatcher, True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[1] == ours[2] == theirs[1]
        assert 0 < error(ours[0], theirs[0]) < TOLERANCE


def test_a_retained_graph_repeats_its_decisions() -> None:
    """Every backward pass begins with the first decision."""
    made: list[int] = []

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = x.sin() * decided(lambda: made.append(1) or float(len(made)))
            return x

    x = torch.ones(1, requires_grad=True)
    output = run_layer(Layer().train(), x, recompute=True)
    first, second = (torch.autograd.grad(output, x, retain_graph=True)[0] for _ in range(2))
    assert len(made) == 2 and torch.equal(first, second)
    (expected,) = torch.autograd.grad(2 * x.sin().sin(), x)
    assert torch.equal(first, expected)
