"""The published Gemma 4 sizes as transformers configurations, from the keys and numbers of their config.json files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Gemma4Config, Gemma4UnifiedConfig


@dataclass(frozen=True)
class Size:
    """A published size.

    Attributes:
        pattern: one global layer follows so many sliding ones; the last layer is global.
        own: keys that the other sizes leave at other values.
        parameters: of the published files, in billions.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int
    pattern: int
    own: dict[str, Any]
    parameters: float


SHARING = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
EXPERTS = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
SIZES = {
    "e2b": Size(
        1536, 6144, 35, 8, 1, 512, 4, SHARING | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}, 5.10
    ),
    "e4b": Size(2560, 10240, 42, 8, 2, 512, 5, SHARING | {"num_kv_shared_layers": 18}, 7.94),
    "26b_a4b": Size(2816, 2112, 30, 16, 8, 1024, 5, LARGE | EXPERTS | {"num_global_key_value_heads": 2}, 25.8),
    "31b": Size(5376, 21504, 60, 32, 16, 1024, 5, LARGE | {"num_global_key_value_heads": 4}, 31.3),
    "12b": Size(3840, 15360, 48, 16, 8, 1024, 5, LARGE | {"num_global_key_value_heads": 1}, 11.96),
}
SMALL_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "use_clipped_linears": True,
    "standardize": False,
}
LARGE_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "use_clipped_linears": False,
    "standardize": True,
}
PATCHES = {"patch_size": 16, "pooling_kernel_size": 3}
# E2B and E4B have the tower that transformers builds by default; written out is what decides its size.
AUDIO_TOWER = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "output_proj_dims": 1536,
    "use_clipped_linears": True,
}


def published_config(name: str) -> Gemma4Config | Gemma4UnifiedConfig:
    """The configuration of one published size, with what it has for images and audio."""
    size = SIZES[name]
    kinds = ["sliding_attention"] * size.pattern + ["full_attention"]
    text = {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [kinds[layer % len(kinds)] for layer in range(size.num_hidden_layers)],
        "sliding_window": size.sliding_window,
        "vocab_size": 262144,
        "max_position_embeddings": 131072 if name.startswith("e") else 262144,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
        **size.own,
    }
    if name == "12b":
        del text["hidden_size_per_layer_input"]
        vision = PATCHES | {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "output_proj_dims": 3840}
        return Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 640})
    is_small = name.startswith("e")
    tower = (SMALL_TOWER if is_small else LARGE_TOWER) | PATCHES | {"position_embedding_size": 10240}
    return Gemma4Config(text_config=text, vision_config=tower, audio_config=AUDIO_TOWER if is_small else None)
