"""Conversations through our builder, and through transformers' processor as a user would call it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from megatron_vlm.data.audio import load_audio
from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.images import load_image
from megatron_vlm.data.prompts import PromptBuilder, Sample
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.data.videos import load_video
from megatron_vlm.errors import ConfigError
from megatron_vlm.families.gemma3.prompt import prompt_rules
from megatron_vlm.families.gemma4.config import ModelConfig, config_from_hf
from tests.data.rows import row
from tests.data.tiny_processor import build_gemma4_processor, build_gemma4_tokenizer, build_gemma4_unified_processor
from tests.families import gemma4

Messages = list[dict[str, Any]]
GEMMA4_VARIANTS = {"E2B": build_gemma4_processor, "12B": build_gemma4_unified_processor}


def gemma3_rules(tokens_per_image: int) -> PromptRules:
    """Gemma 3's rules for the tiny processor, whose image token is id 8."""
    vision = SimpleNamespace(image_size=16, patch_size=4)
    model = SimpleNamespace(text_only=False, image_token_id=8, mm_tokens_per_image=tokens_per_image, vision=vision)
    return prompt_rules(model)


def gemma4_config(variant: str, text_only: bool = False, **media: None) -> ModelConfig:
    """A tiny Gemma 4 for the tiny processor; `vision_config` or `audio_config` None takes these from it."""
    hf_config = gemma4.build_config(variant, tokenizer=build_gemma4_tokenizer())
    for name in media:
        setattr(hf_config, name, None)
    config = config_from_hf(hf_config, text_only)
    if config.vision is None:
        return config
    # The thinnest images are one row of 140 tokens, each of up to two patches per side.
    return replace(config, vision=replace(config.vision, num_positions_per_side=280))


def draw_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Write noise: "photo.jpg", the transparent "glass.png", and NAME.png for names with width and height."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (90, 70, 4), np.uint8)
    Image.fromarray(noise[..., :3]).save(folder / "photo.jpg")
    Image.fromarray(noise).save(folder / "glass.png")
    for name, (width, height) in sizes.items():
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def encode(builder: PromptBuilder, messages: Messages, folder: Path) -> Sample:
    """Our sample of messages whose images, videos and audio lie in `folder`."""
    conversation = parse_row(json.dumps(row(*messages)), "rows.jsonl:7", folder)
    images = [load_image(source, "rows.jsonl:7", False) for source in conversation.images]
    videos = [load_video(source, "rows.jsonl:7", False, builder.sample_frames) for source in conversation.videos]
    limits = builder.audio_limits if conversation.audio else (0, 0)
    audio = [load_audio(source, "rows.jsonl:7", UrlAccess.NONE, *limits) for source in conversation.audio]
    return builder.encode(conversation, images, videos, audio)


def trained_text(builder: PromptBuilder, sample: Sample) -> list[str]:
    """Decoded runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], sample.trained.astype(int), [0]))))
    return [
        builder.tokenizer.decode(sample.input_ids[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def check_trained(builder: PromptBuilder, theirs: dict[str, Any], messages: Messages, folder: Path) -> None:
    """Our ids and trained tokens are those of the processor, called with `return_assistant_tokens_mask`."""
    sample = encode(builder, messages, folder)
    assert sample.input_ids.tolist() == np.asarray(theirs["input_ids"][0]).tolist()
    assert sample.trained.astype(int).tolist() == theirs["assistant_masks"][0]


def refusal(path: Path, rules: PromptRules, **limits: int) -> str:
    """Why a directory does not serve, in one line."""
    with pytest.raises(ConfigError) as raised:
        PromptBuilder(path, rules, **limits)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def reference(path: Path, messages: Messages, folder: Path, **options: Any) -> dict[str, Any]:
    """The processor's own output for messages as a user would pass them: with paths of images and audio."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] in ("image", "audio"):
                part[part["type"]] = str(folder / part[part["type"]])
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options))
