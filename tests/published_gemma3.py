"""The published Gemma 3 sizes as transformers configurations, from the numbers of their model cards and converter."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3Config, Gemma3TextConfig

# hidden, feed-forward, layers, heads, key-value heads, head size, window, query_pre_attn_scalar
TEXT_SIZES: dict[str, tuple[int, ...]] = {
    "270m": (640, 2048, 18, 4, 1, 256, 512, 256),
    "1b": (1152, 6912, 26, 4, 1, 256, 512, 256),
    "4b": (2560, 10240, 34, 8, 4, 256, 1024, 256),
    "12b": (3840, 15360, 48, 16, 8, 256, 1024, 256),
    "27b": (5376, 21504, 62, 32, 16, 128, 1024, 168),
}
TEXT_ONLY = ("270m", "1b")


def published_config(name: str) -> Gemma3Config | Gemma3TextConfig:
    """The configuration of one published size, text-only or with its vision tower."""
    hidden, feed_forward, layers, heads, key_value_heads, head_size, window, scalar = TEXT_SIZES[name]
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_size,
        "sliding_window": window,
        "query_pre_attn_scalar": scalar,
        "vocab_size": 262144 if name in TEXT_ONLY else 262208,
        "max_position_embeddings": 32768 if name in TEXT_ONLY else 131072,
    }
    if name in TEXT_ONLY:
        return Gemma3TextConfig(**text)
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)
