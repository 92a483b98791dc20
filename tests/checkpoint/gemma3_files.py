"""Tiny randomised Gemma 3 checkpoints, written by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


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


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Different random values for every parameter; the defaults start norms and the projector at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, max_shard_size: str = "60KB") -> Path:
    """`save_pretrained`, in several shards, with files that stand for tokenizer, processor and template."""
    model.generation_config = GenerationConfig(eos_token_id=[1, 99], do_sample=False)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        (directory / name).write_text(json.dumps({"file": name}))
    (directory / "README.md").write_text("not part of the model")
    return directory


def multimodal(directory: Path, dtype: torch.dtype = torch.bfloat16, **text: object) -> Path:
    return save(randomise(Gemma3ForConditionalGeneration(multimodal_config(**text))).to(dtype), directory)


def text_only(directory: Path, dtype: torch.dtype = torch.bfloat16, **text: object) -> Path:
    return save(randomise(Gemma3ForCausalLM(Gemma3TextConfig(**(TEXT | text)))).to(dtype), directory)


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Copy a checkpoint into one weight file, with its tensors changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_tensors(source)), target / "model.safetensors", metadata={"format": "pt"})
    return target


def rename(renames: dict[str, str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A change for `rewrite` that replaces prefixes of names; the first that fits is used."""

    def new_name(name: str) -> str:
        for old, new in renames.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return lambda tensors: {new_name(name): tensor for name, tensor in tensors.items()}
