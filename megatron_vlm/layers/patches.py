"""Patches of images and videos of any size, packed into one sequence.

Patches are stored in blocks of merge x merge, each of which makes one token of the language model: blocks in raster
order, and raster order inside each.

Shapes: P patches, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import linear

from megatron_vlm.layers.linear import Group
from megatron_vlm.parallel.images import ImageDivision
from megatron_vlm.parallel.parameters import declare, normal, zeros

Grid = tuple[int, int, int]


def split_frames(grids: Sequence[Grid]) -> list[Grid]:
    """Return all frames as grids of their own: a frame attends to no other frame, not even of the same video."""
    return [(1, height, width) for frames, height, width in grids for _ in range(frames)]


@dataclass(frozen=True)
class PatchPositions:
    """The position of each patch in its frame.

    Attributes:
        row: [P] int64, row of the patch in its frame.
        column: [P] int64, column of the patch in its frame.
        height: [P] int64, number of rows of the patch's frame.
        width: [P] int64, number of columns of the patch's frame.
    """

    row: torch.Tensor
    column: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor


def patch_positions(frames: Sequence[Grid], merge_size: int, device: torch.device) -> PatchPositions:
    """Return positions of packed patches: blocks of merge x merge in raster order, and raster order inside each.

    Args:
        frames: (1, height, width) of each frame in patches.
        merge_size: patches per side of a block.
        device: device of the result; the host sends one small table and waits for nothing.
    """
    _, heights, widths = zip(*frames, strict=True)
    ends = tuple(accumulate(height * width for _, height, width in frames))
    table_3F = torch.tensor((heights, widths, ends)).to(device, non_blocking=True)
    lengths_F = table_3F[0] * table_3F[1]
    height, width, end = torch.repeat_interleave(table_3F, lengths_F, dim=1, output_size=ends[-1])
    inside = torch.arange(ends[-1], device=device) - end + height * width
    block, inside_block = inside // merge_size**2, inside % merge_size**2
    blocks_per_row = width // merge_size
    return PatchPositions(
        row=block // blocks_per_row * merge_size + inside_block // merge_size,
        column=block % blocks_per_row * merge_size + inside_block % merge_size,
        height=height,
        width=width,
    )


class PatchProjection(torch.nn.Module):
    """A convolution whose kernel covers one patch, as one matmul; replicated, as it is at most 0.5 % of a tower.

    Args:
        kernel: channels, (frames,) rows and columns of a patch.
        hidden_size: size of the result.
        dtype: dtype of the weight.
        bias: add a bias.
    """

    def __init__(self, kernel: Sequence[int], hidden_size: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.weight = declare(torch.nn.Parameter(torch.empty(hidden_size, *kernel, dtype=dtype)), "matrix", normal)
        self.bias = (
            declare(torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype)), "vector", zeros) if bias else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map [P, patch features] to [P, hidden size]."""
        return linear(pixel_values.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def encode_packed(
    tower: Any, projector: Any, pixels: torch.Tensor | None, grids: Sequence[Grid], divided_over: Group | None
) -> list[torch.Tensor]:
    """Return `projector(*tower(pixels, grids))` for a micro-batch's images and videos.

    Args:
        tower: module that takes packed patches and grids; its `config` has sizes.
        projector: module that takes what the tower returns, and returns one or more tensors [features, H].
        pixels: [P, patch features], the same on every tensor rank; they may be on the host. None encodes one blank
            image, whose features nobody reads.
        grids: frames, rows and columns of patches of each image or video.
        divided_over: group of ranks that each hold full copies of both modules and encode some of the frames; None
            encodes all frames on this rank.

    Returns:
        Features of all frames on every rank.
    """
    config = tower.config
    merge = config.spatial_merge_size
    blank = [(1, merge, merge)]
    if pixels is None:
        grids, pixels = blank, torch.zeros((merge**2, config.patch_features))
    pixels = pixels.to(next(tower.parameters()).device, non_blocking=True)
    if divided_over is None:
        return projector(*tower(pixels, grids))
    frames = split_frames(grids)
    patches = [math.prod(frame) for frame in frames]
    # Multiply-adds of a layer: those of linears grow with the number of patches, those of attention with its square.
    costs = [count * (config.layer_weights + 2 * count * config.hidden_size) for count in patches]
    division = ImageDivision(patches, costs, divided_over)
    own_frames = [frames[index] for index in division.own] or blank
    features = projector(*tower(division.take(pixels, merge**2), own_frames))
    # One exchange gathers all of the projector's outputs.
    return list(division.gather(torch.cat(features, dim=1), merge**2).chunk(len(features), dim=1))
