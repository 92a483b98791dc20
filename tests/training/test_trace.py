"""What a trace counts, against what can be counted by hand, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all
from transformers import Qwen3VLMoeConfig

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.families import registry
from megatron_vlm.families.build import build_chunks, build_settings
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.recorder import Recorder, fake_tensors
from megatron_vlm.planning.stages import StageCounts, trace_stages
from megatron_vlm.planning.trace import Tracer
from tests.training.test_memory import EXPERTS, LENGTH, PATCHES, QWEN3_VL, SEQUENCE, TENSOR, run_config

HIDDEN, NUM_EXPERTS, TOP_K = 512, 8, 2


def trace(config: Config, world_size: int, images_per_row: float = 1, **text: Any) -> list[StageCounts]:
    """Stages of Qwen3-VL with experts."""
    platform.initialize()
    hf_config = Qwen3VLMoeConfig(**(QWEN3_VL | {"text_config": QWEN3_VL["text_config"] | EXPERTS | text}))
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=not images_per_row)
    return list(
        trace_stages(config, family, model_config, check_layout(config, model_config, world_size), images_per_row)
    )


def test_sent_bytes() -> None:
    """Tensor 2 with sequence parallelism and experts over the same ranks, tensor by tensor.

    Of two ranks each sends half of a tensor that is gathered, scattered or exchanged, and all of one that is
    all-reduced.
    """
    config = run_config(TENSOR, SEQUENCE, "parallel.expert_model_parallel_size=2")
    (stage,) = trace(config, 2)
    (chunk,) = stage.chunks
    hidden_bytes = LENGTH * HIDDEN * 2
    sent = chunk.layers[0].sent_bytes
    # Attention scatters its output, and the gradient of its input.
    assert sent["reduce_scatter", "tensor"] == 2 * hidden_bytes // 2
    # It gathers its input, backward again, and its output's gradient. For the experts every rank says where its rows
    # of each end.
    assert sent["allgather", "tensor"] == 3 * hidden_bytes // 2 + 2 * NUM_EXPERTS * 4 // 2
    # Tokens go to experts and come back, forward and backward; their weights go, and come back as gradients.
    rows = LENGTH // 2 * TOP_K
    assert sent["alltoall", "tensor"] == (4 * rows * HIDDEN * 2 + 2 * rows * 4) // 2
    # Beside the layers: the tower's four sum two outputs and two gradients each, three mergers one of each, and the
    # embedding one output, as it is not scattered before images are placed.
    layer_of_tower, merger = 4 * PATCHES * HIDDEN * 2, PATCHES // 4 * (HIDDEN + 4 * HIDDEN) * 2
    assert chunk.total.sent_bytes["allreduce", "tensor"] == 4 * layer_of_tower + 3 * merger + hidden_bytes


def test_what_an_exchange_of_keys_keeps() -> None:
    """Parts of different sizes: of ten rows sent, and nine received, a rank keeps eight of its own."""
    with simulated_rank(0, Layout.over(2, num_layers=1, context_size=2)) as groups, fake_tensors():
        recorder = Recorder({groups.cp.group_name: "context"})
        with recorder:
            all_to_all(groups.cp, torch.empty(10, 4), [8, 1], [8, 2])
    assert recorder.counts.sent_bytes == {("alltoall", "context"): 2 * 4 * 4}


def test_what_stages_send_each_other() -> None:
    """Hidden states, and the DeepStack level that the second stage adds."""
    config = run_config("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[1,2]")
    first, second = (stage.chunks[0] for stage in trace(config, 2))
    assert first.returned_bytes == second.received_bytes == 2 * LENGTH * HIDDEN * 2
    assert first.received_bytes == second.returned_bytes == 0
    assert (list(first.layers), list(second.layers)) == ([0], [1, 2])


def test_what_the_stages_of_a_tower_send_each_other() -> None:
    """Patches, and the outputs of layers 0 and 1, which become DeepStack features."""
    config = run_config("parallel.pipeline_model_parallel_size=2", "parallel.vision_pipeline_layout=[2,2]")
    first, second = (stage.chunks[0] for stage in trace(config, 2))
    assert first.returned_bytes == second.received_bytes == 3 * PATCHES * HIDDEN * 2
    assert (list(first.layers), list(second.layers)) == ([], [0, 1, 2])


@pytest.mark.parametrize("freeze", ["", "vision_tower"])
def test_a_frozen_tower_computes_no_gradients_of_patches(freeze: str) -> None:
    config = run_config(
        "parallel.pipeline_model_parallel_size=3", "parallel.vision_pipeline_layout=[1,2,1]", f"model.freeze=[{freeze}]"
    )
    _, second, third = (stage.chunks[0].total for stage in trace(config, 3))
    assert second.flops["forward"] and third.flops["backward"]
    patch_bytes = PATCHES * HIDDEN * 2
    assert (second.flops["backward"] == 0) == (second.kept_bytes < patch_bytes) == (freeze == "vision_tower")


def test_flops_follow_spans() -> None:
    """Attention of a causal row, forward and backward, with five products backward for the two forward."""
    (stage,) = trace(run_config("model.recompute=selective"), 1, images_per_row=0)
    counts, pairs = stage.chunks[0].layers[0], LENGTH * (LENGTH + 1) // 2
    product = 2 * 8 * 128 * pairs  # of 8 heads of 128
    assert counts.attention_flops == {"forward": 2 * product, "recompute": 2 * product, "backward": 5 * product}


def test_layers_of_two_kinds() -> None:
    """Each is counted as what it is: experts in the first and the third layer."""
    (stage,) = trace(run_config(), 1, images_per_row=0, mlp_only_layers=[1])
    first, second, third = stage.chunks[0].layers.values()
    assert first is third
    assert first.flops["forward"] != second.flops["forward"] and first.kept_bytes != second.kept_bytes


def test_one_expert_per_rank() -> None:
    """Equally many tokens come to a rank as without expert parallelism, all to its expert."""
    batch = f"train.global_batch_size={NUM_EXPERTS}"
    without, alone = (
        trace(run_config(f"parallel.expert_model_parallel_size={size}", batch), size, images_per_row=0)[0].chunks[0]
        for size in (1, NUM_EXPERTS)
    )
    assert without.layers[0].flops == alone.layers[0].flops
    assert without.total.flops == alone.total.flops


def test_a_tracer_tells_batches_apart() -> None:
    """Rows of two documents each have half of the pairs, though all shapes are the same."""
    config = run_config()
    hf_config = Qwen3VLMoeConfig(**(QWEN3_VL | {"text_config": QWEN3_VL["text_config"] | EXPERTS}))
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=True)
    layout, tracer = check_layout(config, model_config, 1), Tracer()
    settings, rules = build_settings(config, layout), family.prompt_rules(model_config)
    with simulated_rank(0, layout) as groups, fake_tensors():
        (chunk,) = build_chunks(family, model_config, settings, groups, torch.device("cpu"))
        batch = example_batch(model_config, rules, 1, LENGTH)
        low = torch.arange(LENGTH)[None] // (LENGTH // 2) * (LENGTH // 2)
        counts = [
            tracer.trace(chunk, each).total.attention_flops["forward"]
            for each in (batch, dataclasses.replace(batch, span_low=low.int()))
        ]
    assert counts[1] / counts[0] == pytest.approx((LENGTH // 2 + 1) / (LENGTH + 1))


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = object()
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", buffer)
    hook = sys.excepthook
    dispatcher = "parallel.moe_token_dispatcher_type=allgather"
    trace(run_config(TENSOR, SEQUENCE, "parallel.expert_model_parallel_size=2", dispatcher), 2)
    assert parallel_state._GLOBAL_MEMORY_BUFFER is buffer
    assert not torch.distributed.is_initialized() and sys.excepthook is hook
    assert type(torch.zeros(1)) is torch.Tensor
