"""The models of the stages that train: published sizes that one GPU holds, and tiny ones of the same kinds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Gemma3TextConfig, PretrainedConfig, Qwen3VLConfig

from benchmarks.training_sides import auto_class
from tests import published_gemma3, published_qwen3_vl

TINY_TEXT = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 2,
    "num_heads": 2,
    "deepstack_visual_indexes": [0],
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
TINY_IDS = {"image_token_id": 490, "video_token_id": 491, "vision_start_token_id": 492, "vision_end_token_id": 493}


def qwen3_vl_2b(is_tiny: bool) -> Qwen3VLConfig:
    """Return the configuration of Qwen3-VL 2B, or of the same with two layers of each kind."""
    config = published_qwen3_vl.published_config("2b").to_dict()
    if is_tiny:
        config["text_config"] |= TINY_TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2}
        config["vision_config"] |= TINY_TOWER
        config |= TINY_IDS
    return Qwen3VLConfig(**config)


def gemma3_1b(is_tiny: bool) -> Gemma3TextConfig:
    """Return the configuration of Gemma 3 1B, or of the same with two layers."""
    config = published_gemma3.published_config("1b").to_dict()
    if is_tiny:
        config |= TINY_TEXT | {"head_dim": 16, "sliding_window": 20, "layer_types": config["layer_types"][4:6]}
    return Gemma3TextConfig(**config)


def write_random(config: PretrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write a model directory with random weights, drawn on the device: a host takes minutes for billions of them."""
    torch.manual_seed(1)
    with device:
        model = auto_class(config).from_config(config, dtype=dtype)
    model.save_pretrained(folder)
