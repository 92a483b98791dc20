"""Tiny randomised Qwen3-VL models of transformers, dense and with experts, and batches with what transformers takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from megatron_vlm.data.collate import MicroBatch, PlacedSample, collate
from megatron_vlm.data.prompts import Sample
from megatron_vlm.families import registry

VOCABULARY = 152  # rows are padded to 192: the last of four tensor ranks holds padding alone
IMAGE, VIDEO, START, END = 140, 141, 142, 143
EXPERTS, TOP_K = 8, 2

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # unlike heads * head_dim, and unlike twice the experts' width
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
MOE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "depth": 4,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 25,  # frames below stretch and shrink this table of 5 x 5
    "deepstack_visual_indexes": [0, 1, 3],  # features for three of the four decoder layers
}

Part = int | tuple[int, int, int] | tuple[int, int]
"""Text tokens; or an image's rows and columns of patches; or a video's frames, rows and columns."""


def build(moe: bool, tied: bool = False, dtype: torch.dtype = torch.float32, **text: object) -> PreTrainedModel:
    """A tiny model with every parameter random: default initial values (norms of one, zero biases) hide errors."""
    config_class: Any = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    model_class: Any = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    config = config_class(
        text_config=TEXT | (MOE if moe else {}) | text,
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model: PreTrainedModel = model_class(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            if name.endswith("patch_embed.proj.weight"):
                std = parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype)


Rows = Sequence[Sequence[Part]]

# Micro-batches of two rows. Rows differ in length and label tokens; images and frames in size; some have none.
CASES: dict[str, list[Rows]] = {
    "text": [[[24], [15]], [[9], [20]], [[17], [3]], [[22], [22]]],
    "two images": [
        [[3, (4, 6), 5, (8, 4), 2], [2, (2, 2), 4, (6, 6), 1]],
        [[1, (2, 8), 1, (4, 4), 6], [4, (4, 4), 3, (4, 4), 7]],
        [[(4, 2), 5, (2, 2), 3], [2, (6, 4), 5, (2, 4), 9]],
        [[7, (4, 4), 2, (2, 2), 1], [3, (8, 2), 4, (2, 6), 2]],
    ],
    "image and video": [
        [[3, (4, 6), 4, (2, 4, 4), 5], [2, (1, 4, 6), 3, (6, 2), 4]],
        [[5, (3, 2, 4), 3], [1, (2, 4, 2), 2, (4, 4), 2]],
        [[2, (4, 4), 6, (2, 2, 2), 1], [4, (2, 4, 4), 3]],
        [[6, (2, 6, 2), 3, (4, 2), 5], [3, (8, 4), 8]],
    ],
    "mixed": [[[3, (4, 6), 5], [17]], [[12], [9]], [[21], [2, (2, 4, 4), 8]], [[4, (2, 2), 3], [11]]],
}


@dataclass
class Reference:
    """One micro-batch as both sides take it."""

    batch: MicroBatch
    inputs: dict[str, torch.Tensor]
    lengths: list[int]


def make_batch(rows: Rows, seed: int = 0, pad_to_multiple_of: int = 4, moe: bool = False) -> Reference:
    """A micro-batch of random tokens and pixels; labels are missing at random and on images."""
    generator = np.random.default_rng(seed)
    samples = [_sample(parts, generator) for parts in rows]
    config = build_config(moe)
    rules = registry.detect(config).prompt_rules(registry.detect(config).config_from_hf(config, text_only=False))
    placed = [PlacedSample(sample, 0, f"row {number}") for number, sample in enumerate(samples)]
    batch = collate(placed, rules, 0, pad_to_multiple_of)
    lengths = [len(sample.input_ids) for sample in samples]
    return Reference(batch, _transformers_inputs(samples, batch, lengths), lengths)


def build_config(moe: bool) -> Any:
    """The configuration of `build`, without a model."""
    common = {"vision_config": VISION, "image_token_id": IMAGE, "video_token_id": VIDEO}
    return Qwen3VLMoeConfig(text_config=TEXT | MOE, **common) if moe else Qwen3VLConfig(text_config=TEXT, **common)


def _sample(parts: Sequence[Part], generator: np.random.Generator) -> Sample:
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    kinds: list[Literal["image", "video"]] = []
    for part in parts:
        if isinstance(part, int):
            ids += generator.integers(3, IMAGE, part).tolist()
            continue
        frames, height, width = part if len(part) == 3 else (1, *part)
        placeholder = VIDEO if len(part) == 3 else IMAGE
        for _ in range(frames):
            if placeholder == VIDEO:
                ids += generator.integers(3, IMAGE, 2).tolist()  # the time of the frame
            ids += [START, *[placeholder] * (height * width // 4), END]
        grids.append((frames, height, width))
        kinds.append("video" if len(part) == 3 else "image")
    array = np.array(ids, np.int64)
    trained = (generator.random(len(ids)) < 0.6) & (array < IMAGE)
    trained[-1] = True
    patches = sum(t * h * w for t, h, w in grids)
    features = 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2
    pixels = torch.from_numpy(generator.standard_normal((patches, features), np.float32))
    sample = Sample(array, trained, {"pixel_values": pixels} if grids else {}, num_images=len(grids))
    sample.vision_grids = grids
    sample.kinds = kinds  # type: ignore[attr-defined]
    return sample


def _transformers_inputs(samples: list[Sample], batch: MicroBatch, lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = batch.input_ids
    place = torch.arange(ids.shape[1])
    inputs = {
        "input_ids": ids,
        "attention_mask": (place < torch.tensor(lengths)[:, None]).long(),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    pixels: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for sample in samples:
        if not sample.vision_grids:
            continue
        sizes = [t * h * w for t, h, w in sample.vision_grids]
        parts = sample.vision_inputs["pixel_values"].split(sizes)
        for kind, grid, part in zip(sample.kinds, sample.vision_grids, parts, strict=True):  # type: ignore[attr-defined]
            pixels[kind].append(part)
            grids[kind].append(grid)
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if grids[kind]:
            inputs[f"pixel_values{suffix}"] = torch.cat(pixels[kind])
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return inputs


def reference(model: PreTrainedModel, micro_batch: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V], and the sum of token losses, by transformers."""
    logits = model(**micro_batch.inputs).logits
    labels = micro_batch.batch.labels.flatten()
    return logits, cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
