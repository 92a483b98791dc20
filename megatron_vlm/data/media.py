"""Describe the images, videos and clips of audio of a row, and pack their patches into one sequence in reading order.

Shapes: S tokens, P patches, I images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from megatron_vlm.data.conversation import ImageSize
from megatron_vlm.errors import ConfigError, DataError

Grid = tuple[int, int, int]
Sides = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Medium:
    """An image, a video or a clip of audio.

    Attributes:
        kind: image, video or audio; an image is one frame.
        grid: frames, height and width in patches; "frames" are patches in time. Of audio, its frames, 1 and 1.
    """

    kind: Literal["image", "video", "audio"]
    grid: Grid


PIXELS, AUDIO = "pixel_values", "audio_features"
"""Names of the towers' inputs."""
Packed = tuple[dict[str, torch.Tensor], list[Medium]]
"""The towers' inputs by name, float32, for all media in reading order, and the media themselves: images and videos,
then clips of audio. "pixel_values": [P, patch features] of media of any size, [I, channels, height, width] of images
scaled to one size. "audio_features": [frames, values of a frame]. A name is missing where no medium needs it."""


@dataclass(frozen=True)
class MediaRules:
    """How a family's processor treats images, videos and audio."""

    sizes: Mapping[str, int]
    """Sizes in config.json by which images are cut, by the attribute of the processor that must equal them."""
    pack: Callable[[Mapping[str, Any], np.ndarray, str], Packed]
    """Returns inputs and media from (the processor's output, token ids [S], file and line of the row); raises DataError
    where the placeholders do not match the media."""
    limit_pixels: Callable[[Any, int | None, int | None], None]
    """Sets data.min_pixels and data.max_pixels, at least one of them given, on a processor; raises ConfigError where it
    cannot respect them."""
    fit_image: Callable[[Any, Sides, ImageSize], Sides] | None = None
    """Returns the height and width that the processor would give to an image of these sides, within limits that a row
    asks for in place of its own; raises ValueError where none fit. None where all images have one size."""
    most_audio_samples: int | None = None
    """Most samples of a clip of audio: past them the processor cuts it off, or it takes too much memory. None where the
    model takes no audio."""


def pack_in_reading_order(
    output: Mapping[str, Any],
    input_ids: np.ndarray,
    row_name: str,
    *,
    image_token_id: int | None,
    video_token_id: int | None,
    merge_size: int,
) -> Packed:
    """Pack the patches of a row's images and videos in the order of their placeholders.

    Args:
        output: the processor's output, which holds images and videos separately, each as patches with their grids.
        input_ids: [S] int64. Every image and every frame of a video is one run of placeholders.
        row_name: file and line of the row, for error messages.
        image_token_id: id of the placeholder of images.
        video_token_id: id of the placeholder of videos.
        merge_size: patches on each side of the square that one token stands for.

    Raises:
        DataError: the runs of placeholders do not match the images and videos.
    """
    images, videos = _pieces(output, "pixel_values", "image"), _pieces(output, "pixel_values_videos", "video")
    patches: list[torch.Tensor] = []
    media: list[Medium] = []
    frames_left, expected = 0, 0
    for token, length in placeholder_runs(input_ids, image_token_id, video_token_id):
        if frames_left == 0 or token != video_token_id:
            pixels, medium = next(videos if token == video_token_id else images, (None, None))
            if pixels is None or medium is None or frames_left:
                raise _mismatch("more runs of placeholders than images and frames", row_name)
            patches.append(pixels)
            media.append(medium)
            frames_left, height, width = medium.grid
            expected = height * width // merge_size**2
        frames_left -= 1
        if length != expected:
            raise _mismatch(f"{length} placeholders in a run where {expected} features belong", row_name)
    if frames_left or next(images, None) or next(videos, None):
        raise _mismatch("fewer runs of placeholders than images and frames", row_name)
    # Media of a single kind are in order already; patches are large, so they are not copied without need.
    whole = [output[key] for key in ("pixel_values", "pixel_values_videos") if key in output]
    pixels = torch.cat(patches) if len(whole) > 1 else next(iter(whole), None)
    return ({} if pixels is None else {"pixel_values": pixels}), media


def _pieces(
    output: Mapping[str, Any], pixels: str, kind: Literal["image", "video"]
) -> Iterator[tuple[torch.Tensor, Medium]]:
    """Iterate over the images, or the videos: the patches of each and its description."""
    if pixels not in output:
        return iter(())
    media = [Medium(kind, (*grid,)) for grid in output[f"{kind}_grid_thw"].tolist()]
    return zip(output[pixels].split([math.prod(medium.grid) for medium in media]), media, strict=True)


def placeholder_runs(input_ids: np.ndarray, *token_ids: int | None) -> Iterator[tuple[int, int]]:
    """Iterate over the runs of the same placeholder, one of these tokens, as (token, length)."""
    is_placeholder = np.isin(input_ids, [token for token in token_ids if token is not None])
    starts = np.flatnonzero(np.diff(input_ids, prepend=-1))
    lengths = np.diff(starts, append=len(input_ids))
    kept = is_placeholder[starts]
    return zip(input_ids[starts[kept]].tolist(), lengths[kept].tolist(), strict=True)


def _mismatch(what: str, row_name: str) -> DataError:
    return DataError(
        what,
        row_name,
        "the chat template must put every image between vision markers, and the processor must use config.json's sizes",
    )


def limit_areas(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the limits on the image and the video processor; a limit that is not given keeps their own value.

    Args:
        processor: one whose image and video processors call the smallest and largest area "shortest_edge" and
            "longest_edge".
        min_pixels: see `PromptBuilder`.
        max_pixels: see `PromptBuilder`.

    Raises:
        ConfigError: no size lies between the limits.
    """
    for kind in ("image", "video"):
        part = getattr(processor, f"{kind}_processor", None)
        if part is None:
            continue
        fewest = part.size["shortest_edge"] if min_pixels is None else min_pixels
        most = part.size["longest_edge"] if max_pixels is None else max_pixels
        if kind == "video":
            # Limits set with images in mind need not lie between a video's own, which yield.
            fewest, most = (min(fewest, most), most) if min_pixels is None else (fewest, max(fewest, most))
        if not 0 < fewest <= most:
            raise ConfigError(
                f"{kind}s would have at least {fewest} and at most {most} pixels",
                "data.min_pixels" if min_pixels is not None else "data.max_pixels",
                "set both, the second no smaller",
            )
        part.size = SizeDict(shortest_edge=fewest, longest_edge=most)


def fit_areas(processor: Any, sides: Sides, size: ImageSize, *, token_size: int) -> Sides:
    """Fit an image as processors do that limit areas and round sides to whole tokens; see `MediaRules.fit_image`.

    Args:
        processor: see `limit_areas`.
        sides: of the image.
        size: what the row asks for.
        token_size: height and width of the square for which one token stands, in pixels.
    """
    if size.resized_height is not None and size.resized_width is not None:
        sides = size.resized_height, size.resized_width
        return max(1, round(sides[0] / token_size)) * token_size, max(1, round(sides[1] / token_size)) * token_size
    limits = processor.image_processor.size
    most = size.max_pixels or max(limits["longest_edge"], size.min_pixels or 0)
    fewest = size.min_pixels or min(limits["shortest_edge"], most)
    height, width = smart_resize(*sides, factor=token_size, min_pixels=fewest, max_pixels=most)
    return height, width
