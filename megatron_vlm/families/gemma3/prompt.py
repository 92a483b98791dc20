"""The prompt format of Gemma 3: how turns and images are written.

Source: the chat template and `Gemma3Processor` of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_vlm.data.media import MediaRules, Medium, Packed
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_vlm.families.gemma3.config import ModelConfig


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Gemma 3 model: "<start_of_turn>model" opens an answer, "<end_of_turn>" is trained as its end.

    Images are scaled to one size and have equally many tokens, which see each other in both directions.

    Args:
        config: the model's configuration; a text-only one takes no images.
    """
    return PromptRules(
        assistant_start="<start_of_turn>model\n",
        assistant_end="<end_of_turn>",
        image_token_id=None if config.text_only else config.image_token_id,
        turn_tokens=("<start_of_turn>",),
        media_tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        bidirectional_images=not config.text_only,
        media=None if config.text_only else _media_rules(config),
    )


def _media_rules(config: ModelConfig) -> MediaRules:
    vision = config.vision
    assert vision is not None and config.mm_tokens_per_image is not None
    pack = partial(
        stack_images,
        image_token_id=config.image_token_id,
        tokens_per_image=config.mm_tokens_per_image,
        patches_per_side=vision.image_size // vision.patch_size,
    )
    return MediaRules(sizes={}, pack=pack, limit_pixels=_refuse_limits)


def stack_images(
    output: Mapping[str, Any],
    input_ids: np.ndarray,
    row_name: str,
    *,
    image_token_id: int | None,
    tokens_per_image: int,
    patches_per_side: int,
) -> Packed:
    """Stack a row's images into one batch.

    Args:
        output: output of the processor.
        input_ids: token ids of the row, [S] int64.
        row_name: file and line of the row, for error messages.
        image_token_id: token id of image placeholders.
        tokens_per_image: number of placeholders of each image.
        patches_per_side: number of rows, and of columns, of patches of each image.

    Returns:
        "pixel_values" [I, channels, height, width], unless there are no images, and the list of images.

    Raises:
        DataError: there are not as many placeholders as the images need.
    """
    pixels = torch.stack(list(output["pixel_values"])) if "pixel_values" in output else None
    num_images = 0 if pixels is None else len(pixels)
    found = int((input_ids == image_token_id).sum())
    if found != num_images * tokens_per_image:
        raise DataError(
            f"{found} image tokens for {num_images} images of {tokens_per_image} tokens",
            row_name,
            "check that the processor's image_seq_length is config.json's mm_tokens_per_image",
        )
    inputs = {} if pixels is None else {"pixel_values": pixels}
    return inputs, [Medium("image", (1, patches_per_side, patches_per_side))] * num_images


def _refuse_limits(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    key, value = ("data.min_pixels", min_pixels) if min_pixels is not None else ("data.max_pixels", max_pixels)
    raise ConfigError(f"{key} is {value}, but this model scales every image to one size", key, "set it to null")
