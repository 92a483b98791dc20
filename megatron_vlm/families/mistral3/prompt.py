"""The prompt format of Mistral3: how turns and images are written, and how Pixtral's images become patches.

Source: the chat templates of the published checkpoints; `PixtralProcessor` and `PixtralImageProcessor`.
Shapes: S tokens, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.image_utils import SizeDict

from megatron_vlm.data.conversation import ImageSize
from megatron_vlm.data.media import MediaRules, Medium, Packed, Sides
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_vlm.families.mistral3.config import ModelConfig


# [THINK] and [/THINK] are not among them: a text may have them.
TURN_TOKENS = (
    "[INST] [SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS] [CALL_ID] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CONTENT] [PREFIX] [MIDDLE] [SUFFIX]"
).split()


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Mistral3 model: an answer follows the end of another turn, "</s>" is trained as its end.

    Most follow a user's turn, which "[/INST]" ends; also a system prompt, another answer, or the start of the text.
    Images vary in size. The processor writes each as rows of placeholders with a break after each row, the last of
    which is the image's end; breaks and ends are text to the model.

    Args:
        config: the model's configuration; a text-only one takes no images.
    """
    return PromptRules(
        assistant_start="[/INST]",
        assistant_end="</s>",
        image_token_id=config.image_token_id,
        turn_tokens=tuple(TURN_TOKENS),
        media_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        other_starts=("[/SYSTEM_PROMPT]", "</s>", "<s>"),
        media=None if config.text_only else _media_rules(config),
    )


def _media_rules(config: ModelConfig) -> MediaRules:
    vision = config.vision
    assert vision is not None
    sizes = {"patch_size": vision.patch_size, "spatial_merge_size": vision.spatial_merge_size}
    return MediaRules(
        sizes=sizes,
        pack=partial(
            pack_images,
            image_token_id=config.image_token_id,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
        ),
        limit_pixels=partial(limit_longest_edge, token_size=vision.patch_size * vision.spatial_merge_size),
        fit_image=partial(fit_longest_edge, token_size=vision.patch_size * vision.spatial_merge_size),
    )


def pack_images(
    output: Mapping[str, Any],
    input_ids: np.ndarray,
    row_name: str,
    *,
    image_token_id: int | None,
    patch_size: int,
    merge_size: int,
) -> Packed:
    """Pack the patches of a row's images, without the padding by which the processor makes all images equally large.

    Args:
        output: output of the processor: padded images, and the height and width of each in pixels.
        input_ids: token ids of the row, [S] int64.
        row_name: file and line of the row, for error messages.
        image_token_id: token id of image placeholders.
        patch_size: height and width of a patch, in pixels.
        merge_size: patches per side of a block, for which one token stands.

    Returns:
        "pixel_values", patches [P, channels * patch_size^2], unless there are no images, and the list of images. Blocks
        are in raster order, patches in raster order inside each, and values of a patch ordered by channel, row and
        column.

    Raises:
        DataError: the rows of placeholders are not those of the images.
    """
    sizes = output["image_sizes"].tolist() if "image_sizes" in output else []
    grids = [(1, height // patch_size, width // patch_size) for height, width in sizes]
    tokens = [(height // merge_size, width // merge_size) for _, height, width in grids]
    _check_placeholders(input_ids == image_token_id, tokens, row_name)
    patches = []
    for image, (height, width), (rows, columns) in zip(output.get("pixel_values", ()), sizes, tokens, strict=True):
        blocks = image[:, :height, :width].reshape(-1, rows, merge_size, patch_size, columns, merge_size, patch_size)
        patches.append(blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * merge_size**2, -1))
    inputs = {"pixel_values": torch.cat(patches)} if patches else {}
    return inputs, [Medium("image", grid) for grid in grids]


def _check_placeholders(is_image: np.ndarray, images: Sequence[tuple[int, int]], row_name: str) -> None:
    """Check that every image has its rows of placeholders, each as long as the image is wide, and one token between."""
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    first = 0
    for number, (height, width) in enumerate(images, start=1):
        rows = slice(first, first + height)
        lengths, breaks = ends[rows] - starts[rows], starts[rows][1:] - ends[rows][:-1]
        if len(lengths) < height or (lengths != width).any() or (breaks != 1).any():
            raise _mismatch(f"image {number} of {len(images)} is not {height} rows of {width} placeholders", row_name)
        first += height
    if first < len(starts):
        raise _mismatch(f"{len(starts) - first} rows of placeholders belong to none of {len(images)} images", row_name)


def _mismatch(what: str, row_name: str) -> DataError:
    return DataError(
        what,
        row_name,
        "the chat template must write one [IMG] for each image, and the processor its rows with a break after each",
    )


def limit_longest_edge(processor: Any, min_pixels: int | None, max_pixels: int | None, *, token_size: int) -> None:
    """Limit images to the longest edge at which even a square has no more than `max_pixels`.

    Pixtral's processor limits edges, not areas, and rounds them up to whole tokens; it enlarges nothing.

    Args:
        processor: processor of the model, which is changed.
        min_pixels: must be None.
        max_pixels: most pixels of an image.
        token_size: height and width of the block for which one token stands, in pixels.

    Raises:
        ConfigError: `min_pixels` is given, or `max_pixels` is less than the pixels of one token.
    """
    if min_pixels is not None:
        raise ConfigError(
            f"data.min_pixels is {min_pixels}, but this model's processor enlarges no image",
            "data.min_pixels",
            "set it to null",
        )
    assert max_pixels is not None
    edge = math.isqrt(max_pixels) // token_size * token_size
    if edge == 0:
        raise ConfigError(
            f"data.max_pixels is {max_pixels}, fewer than the {token_size**2} of one token",
            "data.max_pixels",
            "raise it",
        )
    processor.image_processor.size = SizeDict(longest_edge=edge)


def fit_longest_edge(processor: Any, sides: Sides, size: ImageSize, *, token_size: int) -> Sides:
    """Fit an image as Pixtral's processor does, with `max_pixels` as in `limit_longest_edge`; see `MediaRules`."""
    if size.min_pixels is not None:
        raise ValueError("`min_pixels` has no meaning for this model, whose processor enlarges no image")
    if size.resized_height is not None and size.resized_width is not None:
        height, width = size.resized_height, size.resized_width
    else:
        edge = processor.image_processor.size["longest_edge"]
        if size.max_pixels is not None:
            edge = min(edge, math.isqrt(size.max_pixels) // token_size * token_size)
        if edge == 0:
            raise ValueError(f"`max_pixels` {size.max_pixels} are fewer than the {token_size**2} of one token")
        shrink = max(1, sides[0] / edge, sides[1] / edge)
        height, width = max(1, math.floor(sides[0] / shrink)), max(1, math.floor(sides[1] / shrink))
    return -(-height // token_size) * token_size, -(-width // token_size) * token_size
