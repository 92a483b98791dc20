"""The files of a Hugging Face directory besides its weights."""

from __future__ import annotations

# What belongs to a checkpoint besides its weights; an export copies them bit for bit.
ASSET_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
)
