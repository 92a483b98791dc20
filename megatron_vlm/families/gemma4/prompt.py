"""The prompt format of Gemma 4: how turns and media are written, and how images, videos and audio become inputs.

Source: "Gemma 4 Prompt Formatting" (ai.google.dev), the chat templates and tokenizers of the published checkpoints;
`Gemma4Processor`, `Gemma4UnifiedProcessor` and their parts in transformers.
Shapes: N images or frames of videos, P patches, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size

from megatron_vlm.data.audio import MAX_AUDIO_VALUES
from megatron_vlm.data.conversation import ImageSize
from megatron_vlm.data.media import MediaRules, Medium, Packed, Sides, pack_in_reading_order, placeholder_runs
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.families.gemma4.audio_config import MOST_AUDIO_SAMPLES, RawAudioConfig
from megatron_vlm.families.gemma4.config import ModelConfig, PixelEmbedderConfig

# <|think|> is not among them: it stands in a system prompt to ask for thinking. Templates cut thinking between channel
# tokens out of an answer's text without a word.
TURN_TOKENS = (
    "<|turn> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>"
).split()
MEDIA_TOKENS = "<|image> <|image|> <image|> <|video|> <|audio> <|audio|> <audio|>".split()
# What the image processor accepts as the most tokens of an image.
TOKEN_BUDGETS = (70, 140, 280, 560, 1120)


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Gemma 4 model: "<|turn>model" opens an answer, "<turn|>" is trained as its end.

    Images and frames of videos vary in size; the processor writes each between markers, a frame behind its time
    ("00:01"). A clip of audio has 25 tokens a second. Unified models have the same format: there the processor merges
    the patches of a token into one, and a frame of audio is raw samples and one token.

    Args:
        config: the model's configuration; a text-only one takes no media.
    """
    has_vision, has_audio = config.vision is not None, config.audio is not None
    takes_media = not config.text_only and (has_vision or has_audio)
    return PromptRules(
        assistant_start="<|turn>model\n",
        assistant_end="<turn|>",
        image_token_id=config.image_token_id if takes_media and has_vision else None,
        video_token_id=config.video_token_id if takes_media and has_vision else None,
        audio_token_id=config.audio_token_id if takes_media and has_audio else None,
        turn_tokens=tuple(TURN_TOKENS),
        media_tokens=tuple(MEDIA_TOKENS),
        bidirectional_images=takes_media and config.bidirectional_images,
        media=_media_rules(config) if takes_media else None,
    )


def _media_rules(config: ModelConfig) -> MediaRules:
    vision, audio = config.vision, config.audio
    is_raw, sizes = isinstance(audio, RawAudioConfig), {}
    if vision is not None:
        pooling_size, patch_size = vision.spatial_merge_size, vision.patch_size
        if isinstance(vision, PixelEmbedderConfig):
            pooling_size = vision.pooling_kernel_size
            patch_size //= pooling_size
        own = {"patch_size": patch_size, "pooling_kernel_size": pooling_size}
        parts = ("image_processor", "video_processor")
        sizes = {f"{part}.{name}": size for part in parts for name, size in own.items()}
    if audio is not None:
        names = ("feature_size", "audio_samples_per_token") if is_raw else ("feature_size",)
        sizes |= {f"feature_extractor.{name}": audio.frame_size for name in names}
    return MediaRules(
        sizes=sizes,
        pack=partial(
            pack_media,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            audio_token_id=config.audio_token_id,
            pooling_size=1 if vision is None else vision.spatial_merge_size,
            most_patches=0 if vision is None else vision.num_positions_per_side,
            frames_per_token=1 if audio is None else audio.frames_per_token,
        ),
        limit_pixels=limit_tokens,
        fit_image=fit_budget,
        most_audio_samples=None if audio is None else MAX_AUDIO_VALUES if is_raw else MOST_AUDIO_SAMPLES,
    )


def pack_media(
    output: Mapping[str, Any],
    input_ids: np.ndarray,
    row_name: str,
    *,
    image_token_id: int | None,
    video_token_id: int | None,
    audio_token_id: int | None,
    pooling_size: int,
    most_patches: int,
    frames_per_token: int,
) -> Packed:
    """Pack a row's images, videos and audio without the padding by which the processor makes each kind equally large.

    Args:
        output: output of the processor.
        input_ids: token ids of the row, [S] int64.
        row_name: file and line of the row, for error messages.
        image_token_id: token id of image placeholders.
        video_token_id: token id of video placeholders.
        audio_token_id: token id of audio placeholders.
        pooling_size: patches per side of a block, for which one token stands.
        most_patches: patches per side of an image for which the model knows places.
        frames_per_token: frames of audio for which one token stands, at most.

    Returns:
        "pixel_values" [P, patch_size^2 * channels] in [0, 1], unless there are no images and videos: blocks in raster
        order, patches in raster order inside each, and values of a patch ordered by row, column and channel.
        "audio_features" [frames, bins or samples], unless there is no audio. And the media.

    Raises:
        DataError: the placeholders are not those of the media, a clip is too short for one, or an image too long.
    """
    inputs, media = pack_in_reading_order(
        _images_and_videos(output, pooling_size, row_name),
        input_ids,
        row_name,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        merge_size=pooling_size,
    )
    longest = max((max(medium.grid[1:]) for medium in media), default=0)
    if longest > most_patches:
        raise DataError(
            f"an image of {longest} patches per side, but the model knows places of {most_patches}",
            row_name,
            "cut the image, or set data.max_pixels",
        )
    clips = [
        np.asarray(features, np.float32)[np.asarray(is_valid, bool)]
        for features, is_valid in zip(
            output.get("input_features", ()), output.get("input_features_mask", ()), strict=True
        )
    ]
    _check_audio(input_ids, audio_token_id, [len(clip) for clip in clips], frames_per_token, row_name)
    if clips:
        inputs["audio_features"] = torch.from_numpy(np.concatenate(clips))
    return inputs, media + [Medium("audio", (len(clip), 1, 1)) for clip in clips]


def _images_and_videos(output: Mapping[str, Any], pooling_size: int, row_name: str) -> dict[str, Any]:
    """Return the processor's images and videos as `pack_in_reading_order` takes them."""
    given: dict[str, Any] = {}
    if "pixel_values" in output:
        images = list(_unpadded(output["pixel_values"], output["image_position_ids"], pooling_size, row_name))
        given["pixel_values"] = torch.cat([patches for patches, _, _ in images])
        given["image_grid_thw"] = torch.tensor([(1, height, width) for _, height, width in images])
    if "pixel_values_videos" in output:
        pixels, positions = output["pixel_values_videos"], output["video_position_ids"]
        if "num_frames_per_video" in output:
            counts = [int(count) for count in output["num_frames_per_video"]]
        else:  # transformers 5.17 has another dimension for videos, all with as many frames
            counts = [pixels.shape[1]] * len(pixels)
            pixels, positions = pixels.flatten(0, 1), positions.flatten(0, 1)
        frames = list(_unpadded(pixels, positions, pooling_size, row_name))
        given["pixel_values_videos"] = torch.cat([patches for patches, _, _ in frames])
        firsts = np.cumsum([0, *counts])[:-1]
        given["video_grid_thw"] = torch.tensor(
            [(count, *frames[first][1:]) for first, count in zip(firsts, counts, strict=True)]
        )
    return given


def _unpadded(
    pixels: torch.Tensor, positions: torch.Tensor, pooling_size: int, row_name: str
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Iterate over images or frames as (patches in blocks [P, patch features], height, width), sizes in patches.

    Args:
        pixels: [N, most patches, patch features], patches in raster order, then padding.
        positions: [N, most patches, 2], column and row of each patch; -1 on padding.
        pooling_size: patches per side of a block.
        row_name: file and line of the row, for error messages.
    """
    counts = (positions[..., 0] >= 0).sum(1).tolist()
    for patches, count, (width, height) in zip(pixels, counts, (positions.amax(1) + 1).tolist(), strict=True):
        what = None
        if height * width != count:
            # What the processor of unified models makes of patches that it was not asked to make fit.
            what = f"the processor merges an image into {count} patches, which do not fill {height} x {width}"
        elif height % pooling_size or width % pooling_size:
            block = f"{pooling_size} x {pooling_size}"
            what = f"the processor makes an image of {height} x {width} patches, {block} of which are one token"
        if what is not None:
            raise DataError(what, row_name, "set do_resize to true in the processor's configuration")
        blocks = patches[: height * width].view(
            height // pooling_size, pooling_size, width // pooling_size, pooling_size, -1
        )
        yield blocks.transpose(1, 2).reshape(height * width, -1), height, width


def _check_audio(
    input_ids: np.ndarray, audio_token_id: int | None, frames: list[int], frames_per_token: int, row_name: str
) -> None:
    """Check that every clip has its run of placeholders, one for each of its tokens."""
    if 0 in frames:
        raise DataError(f"clip {frames.index(0) + 1} of audio is too short to be heard", row_name, "remove it")
    written = [length for _, length in placeholder_runs(input_ids, audio_token_id)]
    expected = [-(-count // frames_per_token) for count in frames]
    if written != expected:
        raise DataError(
            f"runs of {written} placeholders of audio where {expected} features belong",
            row_name,
            "the chat template must write one <|audio|> for each clip",
        )


def limit_tokens(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Limit images to the largest number of tokens that the processor knows and whose pixels `max_pixels` allows.

    Frames of videos, which have a smaller limit of their own, are limited only where that is larger.

    Args:
        processor: processor of the model, which is changed.
        min_pixels: must be None.
        max_pixels: most pixels of an image.

    Raises:
        ConfigError: `min_pixels` is given, or `max_pixels` is less than the smallest limit that the processor knows.
    """
    if min_pixels is not None:
        raise ConfigError(
            f"data.min_pixels is {min_pixels}, but this model's processor scales every image to as many pixels as it "
            "may have",
            "data.min_pixels",
            "set it to null; data.max_pixels is that limit",
        )
    assert max_pixels is not None
    token_pixels = _token_size(processor) ** 2
    budgets = [budget for budget in TOKEN_BUDGETS if budget * token_pixels <= max_pixels]
    if not budgets:
        raise ConfigError(
            f"data.max_pixels is {max_pixels}, fewer than the {TOKEN_BUDGETS[0] * token_pixels} of "
            f"{TOKEN_BUDGETS[0]} tokens, this model's smallest limit",
            "data.max_pixels",
            "raise it",
        )
    processor.image_processor.max_soft_tokens = budgets[-1]
    processor.video_processor.max_soft_tokens = min(processor.video_processor.max_soft_tokens, budgets[-1])


def fit_budget(processor: Any, sides: Sides, size: ImageSize) -> Sides:
    """Fit an image as the processor does, to as many pixels as `max_pixels` and its limit allow; see `MediaRules`."""
    if size.min_pixels is not None:
        raise ValueError("`min_pixels` has no meaning for this model, whose processor fills its limit with any image")
    token_size = _token_size(processor)
    if size.resized_height is not None and size.resized_width is not None:
        sides = size.resized_height, size.resized_width
        return max(1, round(sides[0] / token_size)) * token_size, max(1, round(sides[1] / token_size)) * token_size
    part = processor.image_processor
    tokens = part.max_soft_tokens
    if size.max_pixels is not None:
        tokens = min(tokens, size.max_pixels // token_size**2)
    if tokens == 0:
        raise ValueError(f"`max_pixels` {size.max_pixels} are fewer than the {token_size**2} of one token")
    pooling_size = part.pooling_kernel_size
    return get_aspect_ratio_preserving_size(*sides, part.patch_size, tokens * pooling_size**2, pooling_size)


def _token_size(processor: Any) -> int:
    """Return the height and width of what one token stands for, in pixels."""
    return processor.image_processor.patch_size * processor.image_processor.pooling_kernel_size
