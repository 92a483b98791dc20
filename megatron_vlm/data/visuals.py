"""Images and videos of any size as one sequence of patches, in the order in which their placeholders are read.

Shapes: S tokens, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict

from megatron_vlm.errors import ConfigError, DataError

VisionGrid = tuple[int, int, int]
"""Frames, height and width of an image or video, in patches; "frames" are patches in time."""
Packed = tuple[torch.Tensor | None, list[VisionGrid]]
"""[P, patch features] float32 of all images and videos in reading order, or None without any; and their grids."""


@dataclass(frozen=True)
class VisualRules:
    """What a family's processor does with images and videos of any size."""

    sizes: Mapping[str, int]
    """How config.json cuts images, by the attribute of the processor that must say the same."""
    pack: Callable[[Mapping[str, Any], np.ndarray, str], Packed]
    """Patches from (the processor's output, token ids [S], file and line of the row); DataError where the placeholders
    are not those of the images."""
    limit_pixels: Callable[[Any, int | None, int | None], None]
    """Sets data.min_pixels and data.max_pixels, at least one of them given, on a processor; ConfigError where it cannot
    keep to them."""


def pack_in_reading_order(
    output: Mapping[str, Any],
    input_ids: np.ndarray,
    row_name: str,
    *,
    image_token_id: int | None,
    video_token_id: int | None,
    merge_size: int,
) -> Packed:
    """Patches of a row's images and videos, interleaved as their placeholders are.

    Args:
        output: the processor's: patches of images and of videos apart, with the grids of each.
        input_ids: [S] int64. Every image and every frame of a video is one run of placeholders.
        row_name: file and line of the row, for error messages.
        image_token_id: placeholder of images.
        video_token_id: placeholder of videos.
        merge_size: patches on each side of what one token stands for.

    Raises:
        DataError: the runs of placeholders are not those of the images and videos.
    """
    images, videos = _pieces(output, "pixel_values", "image"), _pieces(output, "pixel_values_videos", "video")
    patches: list[torch.Tensor] = []
    grids: list[VisionGrid] = []
    frames_left = 0
    for token, length in _runs(input_ids, image_token_id, video_token_id):
        if frames_left == 0 or token != video_token_id:
            pixels, grid = next(videos if token == video_token_id else images, (None, (0, 0, 0)))
            if pixels is None or frames_left:
                raise _mismatch("more runs of placeholders than images and frames", row_name)
            patches.append(pixels)
            grids.append(grid)
            frames_left = grid[0]
        frames_left -= 1
        expected = grids[-1][1] * grids[-1][2] // merge_size**2
        if length != expected:
            raise _mismatch(f"{length} placeholders in a run where {expected} features belong", row_name)
    if frames_left or next(images, None) or next(videos, None):
        raise _mismatch("fewer runs of placeholders than images and frames", row_name)
    # One kind alone is in order already; patches are large, so they are not copied without need.
    whole = [output[key] for key in ("pixel_values", "pixel_values_videos") if key in output]
    if len(whole) < 2:
        return (whole[0] if whole else None), grids
    return torch.cat(patches), grids


def _pieces(output: Mapping[str, Any], pixels: str, kind: str) -> Iterator[tuple[torch.Tensor, VisionGrid]]:
    """Patches and grid of each image, or of each video."""
    if pixels not in output:
        return iter(())
    grids = [tuple(grid) for grid in output[f"{kind}_grid_thw"].tolist()]
    sizes = [frames * height * width for frames, height, width in grids]
    return zip(output[pixels].split(sizes), grids, strict=True)


def _runs(input_ids: np.ndarray, image_token_id: int | None, video_token_id: int | None) -> Iterator[tuple[int, int]]:
    """Token and length of each run of the same placeholder."""
    is_vision = np.isin(input_ids, [token for token in (image_token_id, video_token_id) if token is not None])
    starts = np.flatnonzero(np.diff(input_ids, prepend=-1))
    lengths = np.diff(starts, append=len(input_ids))
    kept = is_vision[starts]
    return zip(input_ids[starts[kept]].tolist(), lengths[kept].tolist(), strict=True)


def _mismatch(what: str, row_name: str) -> DataError:
    return DataError(
        what,
        row_name,
        "the chat template must put every image between vision markers, and the processor must use config.json's sizes",
    )


def limit_areas(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Give the limits to the image and the video processor; what is not given keeps their own values.

    Args:
        processor: one whose parts call the area of the smallest and largest image "shortest_edge" and "longest_edge".
        min_pixels: see `PromptBuilder`.
        max_pixels: see `PromptBuilder`.

    Raises:
        ConfigError: there is nothing between the limits.
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
