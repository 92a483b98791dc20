"""Build a micro-batch as large as the configuration allows, to count its memory and FLOPs."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Grid, Medium
from megatron_vlm.data.rules import PromptRules


def example_batch(
    model_config: Any,
    rules: PromptRules,
    num_rows: int,
    length: int,
    images_per_row: float = 0.0,
    max_pixels: int | None = None,
    clips_per_row: float = 0.0,
    clip_tokens: int | None = None,
) -> MicroBatch:
    """Build causal rows full of tokens that all have labels, with images and audio; call it inside `fake_tensors`.

    The first tokens stand for features of images; those of audio have no place in the rows, which makes no difference
    to the counts.

    Args:
        model_config: the family's configuration of the model.
        rules: the family's prompt rules.
        num_rows: number of rows of the micro-batch.
        length: number of tokens of each row.
        images_per_row: images in an average row; infinite for as many as fit.
        max_pixels: most pixels of an image, where images vary in size; None for images that fill their row.
        clips_per_row: clips of audio in an average row.
        clip_tokens: tokens of each clip; None for the longest, and no more of them than rows have room for.
    """
    token = torch.arange(length).expand(num_rows, length)
    row = torch.arange(num_rows)[:, None].expand(num_rows, length)
    zeros, vision = torch.zeros_like(token), model_config.vision
    num_images = 0 if vision is None else num_rows * images_per_row
    grids: list[Grid] = []
    inputs: dict[str, torch.Tensor] = {}
    if num_images and hasattr(vision, "image_size"):
        side = vision.image_size // vision.patch_size
        grids = [(1, side, side)] * math.ceil(num_images)
        inputs = {"pixel_values": torch.empty(len(grids), vision.num_channels, vision.image_size, vision.image_size)}
    elif num_images:
        merge = vision.spatial_merge_size
        largest = length if max_pixels is None else max(1, max_pixels // (vision.patch_size * merge) ** 2)
        num_features = math.ceil(min(num_images * largest, num_rows * length))
        sizes = [largest] * (num_features // largest) + [num_features % largest]
        grids = [(1, merge, merge * size) for size in sizes if size]
        inputs = {"pixel_values": torch.empty(num_features * merge**2, vision.patch_features)}
    num_image_features = sum(height * width // vision.spatial_merge_size**2 for _, height, width in grids)
    place = torch.arange(num_rows * length).view(num_rows, length)
    media, audio = [Medium("image", grid) for grid in grids], model_config.audio
    if audio is not None and clips_per_row:
        longest = clip_tokens or min(audio.most_tokens or length, length)
        most_tokens = math.inf if clip_tokens else num_rows * length
        num_tokens = math.ceil(min(num_rows * clips_per_row * longest, most_tokens))
        sizes = [longest] * (num_tokens // longest) + [num_tokens % longest]
        frames = [size * audio.frames_per_token for size in sizes if size]
        media += [Medium("audio", (count, 1, 1)) for count in frames]
        inputs["audio_features"] = torch.empty(sum(frames), audio.frame_size)
    return MicroBatch(
        input_ids=zeros,
        labels=zeros,
        position_ids=token if rules.position_ids is None else token.expand(3, num_rows, length),
        document_ids=row.int(),
        span_low=zeros.int(),
        span_high=token.int(),
        feature_index=torch.where(place < num_image_features, place, -1).int(),
        num_image_features=num_image_features,
        media_inputs=inputs,
        document_sources=torch.zeros(num_rows, dtype=torch.int32),
        media=media,
    )
