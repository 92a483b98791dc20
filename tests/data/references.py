"""Conversations through our builder, and through transformers' processor as a user would call it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.images import load_image
from megatron_vlm.data.prompts import PromptBuilder, Sample
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.videos import load_video
from megatron_vlm.errors import ConfigError
from megatron_vlm.families.gemma3.prompt import prompt_rules
from tests.data.rows import row

Messages = list[dict[str, Any]]


def gemma3_rules(tokens_per_image: int) -> PromptRules:
    """Gemma 3's rules for the tiny processor, whose image token is id 8."""
    vision = SimpleNamespace(image_size=16, patch_size=4)
    model = SimpleNamespace(text_only=False, image_token_id=8, mm_tokens_per_image=tokens_per_image, vision=vision)
    return prompt_rules(model)


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
    """Our sample of messages whose images and videos lie in `folder`."""
    conversation = parse_row(json.dumps(row(*messages)), "rows.jsonl:7", folder)
    images = [load_image(source, "rows.jsonl:7", False) for source in conversation.images]
    videos = [load_video(source, "rows.jsonl:7", False, builder.sample_frames) for source in conversation.videos]
    return builder.encode(conversation, images, videos)


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
    """The processor's own output for messages as a user would pass them: with paths of images."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = str(folder / part["image"])
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options))
