"""Conversations through our builder, and through transformers' processor as a user would call it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor

from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.images import load_image
from megatron_vlm.data.prompts import PromptBuilder, Sample
from tests.data.rows import row


def encode(builder: PromptBuilder, messages: list[dict[str, Any]], folder: Path) -> Sample:
    """Our sample of messages whose images lie in `folder`."""
    conversation = parse_row(json.dumps(row(*messages)), "rows.jsonl:7", folder)
    return builder.encode(conversation, [load_image(source, "rows.jsonl:7", False) for source in conversation.images])


def trained_text(builder: PromptBuilder, sample: Sample) -> list[str]:
    """Decoded runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], sample.trained.astype(int), [0]))))
    return [
        builder.tokenizer.decode(sample.input_ids[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def reference(path: Path, messages: list[dict[str, Any]], folder: Path, **options: Any) -> dict[str, Any]:
    """The processor's own output for messages as a user would pass them: with paths of images."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = str(folder / part["image"])
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options))
