"""The estimate of activations against what is alive after a forward pass of the model itself."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config, Mistral3Config, PretrainedConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_vlm import platform
from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Medium
from megatron_vlm.families import registry
from megatron_vlm.families.build import build_chunks, build_settings
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.activations import chunk_bytes, structure_of
from megatron_vlm.planning.memory import estimate_memory
from megatron_vlm.planning.preflight import check_layout
from tests.ranks import run_ranks

# Tables of positions, masks and indices are left out of the estimate, and a few tensors that two layers share are
# counted twice. The worst seen is 4 %, where little is kept at all (full recomputation).
TOLERANCE = 0.05
LENGTH, VOCABULARY, PATCHES = 256, 64, 512
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
QWEN3_VL = {
    "text_config": TEXT
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [24, 20, 20]}},
    "vision_config": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "depth": 4,
        "num_heads": 4,
        "out_hidden_size": 512,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    },
    "image_token_id": 60,
    "video_token_id": 61,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
GEMMA3 = {
    "text_config": TEXT | {"query_pre_attn_scalar": 128, "sliding_window": 64},
    "vision_config": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 16,
    "image_token_index": 60,
}
MISTRAL3 = {
    "text_config": TEXT
    | {
        "model_type": "ministral3",
        "max_position_embeddings": LENGTH,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "image_size": 512,
        "patch_size": 16,
    },
    "image_token_index": 60,
    "tie_word_embeddings": False,
}
MODELS: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3Config(**GEMMA3),
    "mistral3": Mistral3Config(**MISTRAL3),
    "qwen3_vl": Qwen3VLConfig(**QWEN3_VL),
    "qwen3_vl_moe": Qwen3VLMoeConfig(**(QWEN3_VL | {"text_config": QWEN3_VL["text_config"] | EXPERTS})),
}


class LiveBytes(TorchDispatchMode):
    """Knows the memory of every tensor made while it is on."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if storage._cdata not in self.parameters:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return outputs

    def total(self) -> int:
        """Bytes that are still alive."""
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


class LikeFlexAttention(torch.autograd.Function):
    """Saves what FlexAttention saves and computes nothing: its inputs, its result and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = q.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return LikeFlexAttention.apply(q, k, v)  # type: ignore[no-any-return]


ATTENTION = (
    "megatron_vlm.layers.attention.span_attention",
    "megatron_vlm.model.qwen_vision.packed_attention",
    "megatron_vlm.families.mistral3.vision.packed_attention",
    "megatron_vlm.families.gemma3.vision.scaled_dot_product_attention",
)


def run_config(*overrides: str) -> Config:
    required = ["run_dir=run", "model.hf_path=model", "data.train=[{path: a}]", f"data.seq_length={LENGTH}"]
    required += ["train.train_iters=1", "train.global_batch_size=1", f"data.max_pixels={PATCHES * 256}"]
    return load_config([f"--{override}" for override in [*required, *overrides]])


def make_batch(vision: Any) -> MicroBatch:
    """One row full of tokens, half of them visual where images vary in size; one image elsewhere."""
    places = torch.arange(LENGTH)[None]
    varying = hasattr(vision, "spatial_merge_size")
    num_features = PATCHES // 4 if varying else 16
    pixels = torch.randn(PATCHES, vision.patch_features) if varying else torch.randn(1, 3, 224, 224)
    return MicroBatch(
        input_ids=torch.ones_like(places),
        labels=torch.ones_like(places),
        position_ids=places.expand(3, 1, -1) if hasattr(vision, "deepstack_layers") else places,
        document_ids=torch.zeros_like(places).int(),
        span_low=torch.zeros_like(places).int(),
        span_high=places.int(),
        feature_index=torch.where(places < num_features, places, -1).int(),
        media_inputs={"pixel_values": pixels},
        document_sources=torch.zeros(1, dtype=torch.int32),
        media=[Medium("image", (1, 16, 16 if not varying else PATCHES // 16))],
    )


def kept_bytes(name: str, config: Config, groups: ProcessGroupCollection, with_backward: bool = False) -> int:
    """Bytes alive after the forward pass of one micro-batch, on this rank, or after the backward pass too."""
    family, model_config = registry.detect(MODELS[name]), record(name)
    layout = check_layout(config, model_config, torch.distributed.get_world_size())
    initialize_megatron(1, groups)
    (chunk,) = build_chunks(family, model_config, build_settings(config, layout), groups)
    for parameter in chunk.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    Trainable(config.model.freeze).freeze([chunk])
    with ExitStack() as patches:
        for place in ATTENTION:
            patches.enter_context(mock.patch(place, attention))
        with LiveBytes(chunk) as live:
            losses = chunk(make_batch(model_config.vision))
            if with_backward:
                losses.sum().backward()
                del losses
                chunk.zero_grad()
        return live.total()


def record(name: str) -> Any:
    return registry.detect(MODELS[name]).config_from_hf(MODELS[name], text_only=False)


def estimate(name: str, config: Config, world_size: int) -> float:
    """The estimate for one micro-batch, without what is computed again, which is not alive yet."""
    family, model_config = registry.detect(MODELS[name]), record(name)
    layout = check_layout(config, model_config, world_size)
    (memory,) = estimate_memory(config, family, model_config, layout)
    shapes = {name: weight.shape for name, weight in family.weight_map(model_config).items()}
    structure = structure_of(shapes, model_config.text.hidden_size, config.model.freeze)
    parts = chunk_bytes(config, model_config, layout, 0, structure, 1, config.model.recompute)
    if config.model.recompute == "none":
        assert memory.activation_bytes == pytest.approx(sum(parts))
    return sum(parts) + memory.logits_bytes


@pytest.mark.parametrize(
    ("recompute", "precision"), [("none", "bf16"), ("selective", "bf16"), ("full", "bf16"), ("none", "fp32")]
)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_estimate_on_one_rank(name: str, recompute: str, precision: str) -> None:
    platform.initialize()
    config = run_config(f"model.recompute={recompute}", f"train.precision={precision}")
    expected = estimate(name, config, 1)
    with simulated_rank(0, Layout()) as groups:
        kept = kept_bytes(name, config, groups)
    print(f"{name} {recompute} {precision}: {kept / expected:.3f} of the estimate")
    assert kept == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("frozen", ["vision_tower", "vision_tower,projector"])
@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl"])
def test_estimate_with_frozen_parts(name: str, frozen: str) -> None:
    platform.initialize()
    config = run_config(f"model.freeze=[{frozen}]")
    expected = estimate(name, config, 1)
    with simulated_rank(0, Layout()) as groups:
        kept = kept_bytes(name, config, groups)
    print(f"{name} without {frozen}: {kept / expected:.3f} of the estimate")
    assert kept == pytest.approx(expected, rel=TOLERANCE)


def test_nothing_outlives_the_backward_pass() -> None:
    """Recomputation must not leave the graph that it rebuilds with anything that lives on, such as a dispatcher."""
    platform.initialize()
    config = run_config("model.recompute=full", "train.precision=fp32")
    with simulated_rank(0, Layout()) as groups:
        name = "qwen3_vl_moe"
        kept = kept_bytes(name, config, groups)
        left = kept_bytes(name, config, groups, with_backward=True)
    assert left < 0.05 * kept


DIVIDED = {
    "mistral3": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "qwen3_vl": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "qwen3_vl_moe": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.expert_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=2",
    ],
}


def kept_by_rank(name: str) -> int:
    config = run_config(*DIVIDED[name], "train.global_batch_size=2")
    return kept_bytes(name, config, build_groups(check_layout(config, record(name), 4)))


@pytest.mark.parametrize("name", sorted(DIVIDED))
def test_estimate_where_layers_are_divided(name: str) -> None:
    """Tensor 2 x data 2, and experts over the same four ranks, which together keep what equal shares would be."""
    expected = estimate(name, run_config(*DIVIDED[name], "train.global_batch_size=2"), 4)
    kept = sum(run_ranks(4, kept_by_rank, name)) / 4
    print(f"{name}: {kept / expected:.3f} of the estimate")
    assert kept == pytest.approx(expected, rel=TOLERANCE)
