"""The published Mistral3 sizes as transformers configurations, from the numbers of their config.json files."""

from __future__ import annotations

from typing import Any

from transformers import Mistral3Config

# hidden, feed-forward, layers, tied, base of the rotary frequencies, billions of parameters
SIZES: dict[str, tuple[Any, ...]] = {
    "ministral3_3b": (3072, 9216, 26, True, 1e6, 3.849),
    "ministral3_8b": (4096, 14336, 34, False, 1e6, 8.918),
    "ministral3_14b": (5120, 16384, 40, False, 1e9, 13.945),
    "mistral3_24b": (5120, 32768, 40, False, 1e9, 24.011),
}
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def published_config(name: str) -> Mistral3Config:
    """The configuration of one published size."""
    hidden, feed_forward, layers, tied, theta, _ = SIZES[name]
    ministral = name.startswith("ministral3")
    text = {
        "model_type": "ministral3" if ministral else "mistral",
        "vocab_size": 131072,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 262144 if ministral else 131072,
        "rope_parameters": (YARN if ministral else {"rope_type": "default"}) | {"rope_theta": theta},
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "hidden_act": "silu",
        "image_size": 1540,
        "patch_size": 14,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
    }
    # The published files of Mistral Small say nothing about tying at the top level; its weights have a head.
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=10,
        spatial_merge_size=2,
        projector_hidden_act="gelu",
        multimodal_projector_bias=False,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
