"""Qwen3-VL's model FLOPs against torch's own counter on transformers' models, dense and with experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Medium
from megatron_vlm.families import registry
from megatron_vlm.families.qwen3_vl.config import config_from_hf
from tests.training.model_flops import FROZEN, batch_flops
from tests.versions import needs_transformers_5_23

(FAMILY,) = (family for family in registry.FAMILIES if family.name == "qwen3_vl")
VOCABULARY, IMAGE, VIDEO, LENGTH = 152, 150, 151, 24
Grid = tuple[int, int, int]
# Images and videos (frames, height, width in patches) of each of the two rows.
ROWS: dict[str, list[list[Grid]]] = {
    "images and a video": [[(1, 4, 6), (2, 2, 4)], [(1, 8, 2)]],
    "text": [[], []],
}


def build(with_experts: bool) -> tuple[PreTrainedModel, Any]:
    """A tiny model whose second layer is dense also when the others have experts, and its record."""
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "depth": 4,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 24,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
    }
    settings = {"vision_config": vision, "image_token_id": IMAGE, "video_token_id": VIDEO}
    # Plain products: torch counts no grouped ones, and a fused backward pass with the scores computed twice.
    if with_experts:
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
        config: Any = Qwen3VLMoeConfig(text_config=text, tie_word_embeddings=False, **settings)
        model: PreTrainedModel = Qwen3VLMoeForConditionalGeneration._from_config(config, experts_implementation="eager")
    else:
        config = Qwen3VLConfig(text_config=text, tie_word_embeddings=False, **settings)
        model = Qwen3VLForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model, config_from_hf(config, text_only=False)


def make_batch(rows: Sequence[Sequence[Grid]], record: Any) -> MicroBatch:
    """Rows without padding, whose tokens all see each other: transformers computes all pairs whatever the mask."""
    ids = torch.randint(0, IMAGE, (len(rows), LENGTH), generator=torch.Generator().manual_seed(1))
    for row, grids in zip(ids, rows, strict=True):
        place = 1
        for frames, height, width in grids:
            for _ in range(frames):  # a token between frames, as in real prompts
                count = height * width // 4
                row[place : place + count] = VIDEO if frames > 1 else IMAGE
                place += count + 1
        assert place <= LENGTH
    grids = [grid for row in rows for grid in row]
    num_patches = sum(frames * height * width for frames, height, width in grids)
    patches = torch.randn(num_patches, record.vision.patch_features)
    places = torch.zeros_like(ids).int()
    return MicroBatch(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(LENGTH).expand(3, len(rows), -1),
        document_ids=torch.arange(len(rows), dtype=torch.int32)[:, None].expand_as(ids),
        span_low=places,
        span_high=places + LENGTH - 1,
        feature_index=places,
        media_inputs={"pixel_values": patches},
        document_sources=torch.zeros(len(rows), dtype=torch.int32),
        media=[Medium("video" if grid[0] > 1 else "image", grid) for grid in grids],
    )


def torch_flops(model: PreTrainedModel, batch: MicroBatch, backward: bool) -> int:
    inputs: dict[str, torch.Tensor] = {}
    patches = batch.media_inputs["pixel_values"].split([t * h * w for t, h, w in batch.grids])
    for kind, (pixels, grid) in {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }.items():
        held = [index for index, (t, _, _) in enumerate(batch.grids) if (t > 1) == (kind == "video")]
        if held:
            inputs[pixels] = torch.cat([patches[index] for index in held])
            inputs[grid] = torch.tensor([batch.grids[index] for index in held])
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=batch.input_ids, position_ids=batch.position_ids, **inputs).logits.sum()
        if backward and loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def freeze(model: PreTrainedModel, frozen: set[str]) -> None:
    for name, parameter in model.named_parameters():
        part = "language_model"
        if name.startswith("model.visual."):
            part = "projector" if "merger" in name else "vision_tower"
        parameter.requires_grad_(part not in frozen)


@pytest.mark.parametrize("with_experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda frozen: "frozen: " + (", ".join(sorted(frozen)) or "nothing"))
@needs_transformers_5_23
def test_count_equals_torch(with_experts: bool, kind: str, frozen: set[str]) -> None:
    """Forward and backward, exactly; and the forward pass alone, which is the count with everything frozen."""
    model, record = build(with_experts)
    freeze(model, frozen)
    batch = make_batch(ROWS[kind], record)
    on_later_stages = replace(batch, media_inputs={})
    assert batch_flops(FAMILY, record, on_later_stages, frozen) == torch_flops(model, batch, backward=True)
    everything = {"language_model", "vision_tower", "projector"}
    assert batch_flops(FAMILY, record, on_later_stages, everything) == torch_flops(model, batch, backward=False)


def test_padding_and_hidden_keys_are_free() -> None:
    """Causal rows: half of a row's pairs, and nothing for places without a token."""
    _, record = build(True)
    batch = make_batch(ROWS["text"], record)
    places = torch.arange(LENGTH, dtype=torch.int32).expand(2, -1)
    is_real = places < torch.tensor([[LENGTH], [10]])
    causal = replace(
        batch,
        document_ids=torch.where(is_real, 0, -1).int(),
        span_low=torch.where(is_real, 0, places),
        span_high=places,
    )
    pairs = sum(range(1, LENGTH + 1)) + sum(range(1, 11))
    layers = record.text.layers
    attention = sum(3 * 4 * layer.num_attention_heads * layer.head_dim for layer in layers)
    whole = batch_flops(FAMILY, record, batch)
    linear_per_token = (whole - attention * 2 * LENGTH**2) / (2 * LENGTH)
    assert batch_flops(FAMILY, record, causal) == linear_per_token * (LENGTH + 10) + attention * pairs


@needs_transformers_5_23
def test_text_only_model_counts_no_vision() -> None:
    model, record = build(False)
    batch = make_batch(ROWS["text"], record)
    assert batch_flops(FAMILY, config_from_hf(model.config, text_only=True), batch) == torch_flops(
        model, batch, backward=True
    )
