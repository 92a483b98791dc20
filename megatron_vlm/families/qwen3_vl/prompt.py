"""The prompt format of Qwen3-VL: turns, images, videos, and the positions on three axes for its rotary embedding.

Shapes: S tokens, F frames (an image is one frame; a video has one for each row of its grid in time).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.data.media import MediaRules, Medium, fit_areas, limit_areas, pack_in_reading_order
from megatron_vlm.data.rules import PromptRules

TURN_TOKENS = ("<|im_start|>", "<|endoftext|>")
# <|object_ref_start|>, <|box_start|> and the like are not among them: they are text about an image, not an image.
MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

if TYPE_CHECKING:
    from megatron_vlm.families.qwen3_vl.config import ModelConfig
    from megatron_vlm.model.qwen_vision import QwenVisionConfig


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Qwen3-VL model: ChatML, in which "<|im_end|>" is trained as the end of an answer.

    Images and videos vary in size. The processor writes each frame of a video as "<1.5 seconds>" and a run of
    placeholders between vision markers.

    Args:
        config: the model's configuration; a text-only one takes no images and videos.
    """
    start, end = "<|im_start|>assistant\n", "<|im_end|>"
    if config.text_only:
        numbered = partial(position_ids, media_token_ids=[], merge_size=1)
        return PromptRules(
            start, end, image_token_id=None, turn_tokens=TURN_TOKENS, media_tokens=MEDIA_TOKENS, position_ids=numbered
        )
    image, video, vision = config.image_token_id, config.video_token_id, config.vision
    assert image is not None and video is not None and vision is not None
    return PromptRules(
        start,
        end,
        image_token_id=image,
        video_token_id=video,
        turn_tokens=TURN_TOKENS,
        media_tokens=MEDIA_TOKENS,
        media=_media_rules(image, video, vision),
        position_ids=partial(position_ids, media_token_ids=[image, video], merge_size=vision.spatial_merge_size),
    )


def _media_rules(image_token_id: int, video_token_id: int, vision: QwenVisionConfig) -> MediaRules:
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    pack = partial(
        pack_in_reading_order,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        merge_size=vision.spatial_merge_size,
    )
    parts = ("image_processor", "video_processor")
    return MediaRules(
        {f"{part}.{name}": size for part in parts for name, size in sizes.items()},
        pack,
        limit_areas,
        partial(fit_areas, token_size=vision.patch_size * vision.spatial_merge_size),
    )


def position_ids(
    input_ids: np.ndarray, media: Sequence[Medium], media_token_ids: Sequence[int], merge_size: int
) -> np.ndarray:
    """Positions of one document: a text token advances all axes by one, a frame spans a plane of height and width.

    The tokens of a frame have the same time position, at which the frame begins; height and width count on from there,
    and what follows begins after the larger of the two, so that the last position is below the number of tokens.

    Args:
        input_ids: [S] int64, with one placeholder for each `merge_size` x `merge_size` patches.
        media: the document's images and videos in reading order.
        media_token_ids: token ids of image and video placeholders.
        merge_size: patches per side of a block, for which one token stands.

    Returns:
        [3, S] int64: time, height and width.

    Source: `Qwen3VLModel.get_rope_index` in transformers, which walks through the runs of placeholders.
    """
    is_vision = np.isin(input_ids, media_token_ids)
    text_before = np.cumsum(~is_vision) - ~is_vision
    grids = np.array([medium.grid for medium in media], np.int64).reshape(-1, 3)
    # Every frame of a video gets positions like an image: the text before it states its time.
    heights, widths = np.repeat(grids[:, 1:] // merge_size, grids[:, 0], axis=0).T
    ends = np.cumsum(heights * widths)
    assert is_vision.sum() == (ends[-1] if len(ends) else 0), "the prompt was checked against its grids"
    advances = np.concatenate(([0], np.cumsum(np.maximum(heights, widths))))
    frames_before = np.searchsorted(ends, np.cumsum(is_vision) - is_vision, side="right")
    positions = np.tile(text_before + advances[frames_before], (3, 1))
    if len(ends):
        frame = frames_before[is_vision]
        offset = np.arange(ends[-1]) - (ends - heights * widths)[frame]
        positions[1, is_vision] += offset // widths[frame]
        positions[2, is_vision] += offset % widths[frame]
    return positions
