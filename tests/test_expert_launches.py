"""How many operators a layer of experts gives a GPU, with recomputation, and how often the host waits for it."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.layers import expert_exchange
from megatron_vlm.layers.moe import LocalTokens, MoE, TopKRouter
from megatron_vlm.layers.recompute import run_layer
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning import trace
from megatron_vlm.planning.recorder import Recorder, fake_tensors

HIDDEN, TOKENS = 256, 64
CONFIG = MoEConfig(128, 8, 96)
# Collectives included; with megatron-core's router and dispatcher they were 26, 26 and 22, and 64, 64 and 28.
MOST = {
    1: {"forward": 9, "recompute": 8, "backward": 15},
    8: {"forward": 16, "recompute": 14, "backward": 20},
}


class CountedCopy:
    """A copy to the host; counts the times that the host waits for one."""

    waits = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        CountedCopy.waits += 1
        return self.tensor


@pytest.mark.parametrize("expert_size", MOST)
def test_launches_and_waits(expert_size: int) -> None:
    layout = Layout.over(expert_size, num_layers=1, expert_size=expert_size)
    with simulated_rank(0, layout) as groups, fake_tensors():
        settings = build_mcore_config(HIDDEN, 4, torch.bfloat16, layout)
        chunk = ChunkSettings((0,), 0, True, True, None, settings)
        layer = MoE(HIDDEN, CONFIG, TopKRouter(HIDDEN, CONFIG, settings), chunk, groups).train()
        recorder = Recorder({})

        def choose_evenly(*arguments: Any) -> Any:
            with recorder.paused():  # stands for values that there are none of
                return trace._choose_evenly(CONFIG.top_k, *arguments)

        layer.gate.register_forward_hook(choose_evenly)
        for parameter in layer.parameters():
            parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            parameter.grad_added_to_main_grad = False
            parameter.register_post_accumulate_grad_hook(trace._add_to_main_gradient)
        x_SBH = torch.empty(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        tokens = LocalTokens.of(torch.zeros(1, TOKENS, dtype=torch.int32), chunk, groups)
        CountedCopy.waits = 0
        with mock.patch.object(expert_exchange, "HostCopy", CountedCopy), recorder:
            output, _ = run_layer(layer, x_SBH, tokens, recompute=True)
            with recorder.paused():
                gradient = torch.empty_like(output, requires_grad=False)
            recorder.in_backward = True
            output.backward(gradient)
    launches = Counter(recorder.counts.launches)
    for collective, times in recorder.counts.collectives.items():
        launches[collective.phase] += times
    print(f"{expert_size} expert ranks: {dict(launches)}, {CountedCopy.waits} waits")
    assert set(launches) == set(MOST[expert_size])
    assert all(launches[phase] <= most for phase, most in MOST[expert_size].items()), launches
    assert CountedCopy.waits == (0 if expert_size == 1 else 1)
