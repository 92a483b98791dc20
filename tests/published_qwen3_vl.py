"""The published Qwen3-VL sizes as transformers configurations, from the numbers of their config.json files."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

# hidden, feed-forward, layers, heads, key-value heads, tied, and the tower's (hidden, feed-forward, layers, taps)
SMALL_TOWER = (1024, 4096, 24, (5, 11, 17))
LARGE_TOWER = (1152, 4304, 27, (8, 16, 24))
SIZES: dict[str, tuple[Any, ...]] = {
    "2b": (2048, 6144, 28, 16, 8, True, SMALL_TOWER),
    "4b": (2560, 9728, 36, 32, 8, True, SMALL_TOWER),
    "8b": (4096, 12288, 36, 32, 8, False, LARGE_TOWER),
    "32b": (5120, 25600, 64, 64, 8, False, LARGE_TOWER),
    "30b_a3b": (2048, 6144, 48, 32, 4, False, LARGE_TOWER),
    "235b_a22b": (4096, 12288, 94, 64, 4, False, LARGE_TOWER),
}
EXPERT_WIDTHS = {"30b_a3b": 768, "235b_a22b": 1536}


def published_config(name: str) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """The configuration of one published size."""
    hidden, feed_forward, layers, heads, key_value_heads, tied, tower = SIZES[name]
    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20]},
    }
    vision = {
        "hidden_size": tower[0],
        "intermediate_size": tower[1],
        "depth": tower[2],
        "num_heads": 16,
        "deepstack_visual_indexes": list(tower[3]),
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    if name not in EXPERT_WIDTHS:
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    text |= {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": EXPERT_WIDTHS[name],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
