"""Tiny randomised Qwen3-VL models of transformers, dense and with experts, and batches with what transformers takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.parity.tiny_batches import Random, Reference, Rows, RowWriter, collate_rows, randomise

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
    randomise(model)
    return model.to(dtype)


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


def _write(frames: int, height: int, width: int, is_video: bool, generator: Random) -> list[int]:
    """Placeholders between markers; a video has a run for each frame, after the text of its time."""
    placeholder, ids = (VIDEO if is_video else IMAGE), []
    for _ in range(frames):
        if is_video:
            ids += generator.integers(3, IMAGE, 2).tolist()
        ids += [START, *[placeholder] * (height * width // 4), END]
    return ids


WRITER = RowWriter(IMAGE, 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2, _write)


def build_config(moe: bool) -> Any:
    """The configuration of `build`, without a model."""
    common = {"vision_config": VISION, "image_token_id": IMAGE, "video_token_id": VIDEO}
    return Qwen3VLMoeConfig(text_config=TEXT | MOE, **common) if moe else Qwen3VLConfig(text_config=TEXT, **common)


def make_batch(rows: Rows, seed: int = 0, pad_to_multiple_of: int = 4, moe: bool = False) -> Reference:
    """A micro-batch of random tokens and pixels."""
    generator = np.random.default_rng(seed)
    written = [WRITER.row(parts, generator) for parts in rows]
    batch = collate_rows(written, build_config(moe), pad_to_multiple_of)
    lengths = [len(row.sample.input_ids) for row in written]
    ids = batch.input_ids
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long(),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for is_video, kind, suffix in ((False, "image", ""), (True, "video", "_videos")):
        parts = [piece for row in written for piece in row.pieces(is_video)]
        if parts:
            inputs[f"{kind}_grid_thw"] = torch.tensor([grid for grid, _ in parts])
            inputs[f"pixel_values{suffix}"] = torch.cat([patches for _, patches in parts])
    return Reference(batch, inputs, lengths)
