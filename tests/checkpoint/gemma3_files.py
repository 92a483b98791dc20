"""Tiny randomised Gemma 3 checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from tests.checkpoint.hf_files import randomise, save

VOCABULARY = 100  # not a multiple of 64: rows are padded to 128 in our checkpoints
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


def multimodal_config(**text: object) -> Gemma3Config:
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**(TEXT | text)),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=98,
        boi_token_index=96,
        eoi_token_index=97,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )
    return config


def multimodal(directory: Path, dtype: torch.dtype = torch.bfloat16, **text: object) -> Path:
    return save(randomise(Gemma3ForConditionalGeneration(multimodal_config(**text))).to(dtype), directory)


def text_only(directory: Path, dtype: torch.dtype = torch.bfloat16, **text: object) -> Path:
    return save(randomise(Gemma3ForCausalLM(Gemma3TextConfig(**(TEXT | text)))).to(dtype), directory)
