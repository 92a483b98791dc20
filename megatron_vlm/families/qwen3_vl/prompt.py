"""How Qwen3-VL writes turns, images and videos, and the positions on three axes that its rotary embedding turns by.

Shapes: S tokens, F frames (an image is one frame; a video has one for each row of its grid in time).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.visuals import VisionGrid, VisualRules, limit_areas, pack_in_reading_order

if TYPE_CHECKING:
    from megatron_vlm.families.qwen3_vl.config import ModelConfig, VisionConfig


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Qwen3-VL model: ChatML, in which "<|im_end|>" is trained as the end of an answer.

    Images and videos vary in size. The processor writes each frame of a video as "<1.5 seconds>" and a run of
    placeholders between vision markers.

    Args:
        config: the model's configuration; a text-only one takes no images and videos.
    """
    tokens = [token for token in (config.image_token_id, config.video_token_id) if token is not None]
    merge_size = 1 if config.vision is None else config.vision.spatial_merge_size
    return PromptRules(
        assistant_start="<|im_start|>assistant\n",
        assistant_end="<|im_end|>",
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        visuals=None if config.vision is None else _visual_rules(config, config.vision),
        position_ids=partial(position_ids, vision_token_ids=tokens, merge_size=merge_size),
    )


def _visual_rules(config: ModelConfig, vision: VisionConfig) -> VisualRules:
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    pack = partial(
        pack_in_reading_order,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=vision.spatial_merge_size,
    )
    parts = ("image_processor", "video_processor")
    return VisualRules({f"{part}.{name}": size for part in parts for name, size in sizes.items()}, pack, limit_areas)


def position_ids(
    input_ids: np.ndarray, vision_grids: Sequence[VisionGrid], vision_token_ids: Sequence[int], merge_size: int
) -> np.ndarray:
    """Positions of one document: a text token advances all axes by one, a frame spans a plane of height and width.

    The tokens of a frame share the time at which it begins; height and width count on from there, and what follows
    begins after the larger of the two, so that the last position is below the number of tokens.

    Args:
        input_ids: [S] int64, with one placeholder for each `merge_size` x `merge_size` patches.
        vision_grids: frames, height and width in patches of each image or video in reading order.
        vision_token_ids: the placeholders.
        merge_size: patches on each side of what one token stands for.

    Returns:
        [3, S] int64: time, height and width.

    Source: `Qwen3VLModel.get_rope_index` in transformers, which walks through the runs of placeholders.
    """
    is_vision = np.isin(input_ids, vision_token_ids)
    text_before = np.cumsum(~is_vision) - ~is_vision
    grids = np.array(vision_grids, np.int64).reshape(-1, 3)
    # Every frame of a video is placed like an image: time is told by the text before it.
    heights, widths = np.repeat(grids[:, 1:] // merge_size, grids[:, 0], axis=0).T
    ends = np.cumsum(heights * widths)
    assert is_vision.sum() == (ends[-1] if len(ends) else 0), "the prompt was checked against its grids"
    advances = np.concatenate(([0], np.cumsum(np.maximum(heights, widths))))
    frames_before = np.searchsorted(ends, np.cumsum(is_vision) - is_vision, side="right")
    positions = np.tile(text_before + advances[frames_before], (3, 1))
    if len(ends):
        frame = frames_before[is_vision]
        place = np.arange(ends[-1]) - (ends - heights * widths)[frame]
        positions[1, is_vision] += place // widths[frame]
        positions[2, is_vision] += place % widths[frame]
    return positions
