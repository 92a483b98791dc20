"""Patches of images and videos of any size, packed into one sequence.

They lie in blocks of merge x merge, which make one token of the language model each: blocks in raster order, raster
order inside each.

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
    """The frames of images and videos as grids of their own: a frame attends to no other, of its video neither."""
    return [(1, height, width) for frames, height, width in grids for _ in range(frames)]


@dataclass(frozen=True)
class PatchPositions:
    """Where each patch lies in its frame.

    Attributes:
        row: [P] int64.
        column: [P] int64.
        height: [P] int64, rows of the patch's frame.
        width: [P] int64, columns of the patch's frame.
    """

    row: torch.Tensor
    column: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor


def patch_positions(frames: Sequence[Grid], merge_size: int, device: torch.device) -> PatchPositions:
    """PatchPositions of packed patches: blocks of merge x merge in raster order, raster order inside each.

    Args:
        frames: (1, height, width) in patches.
        merge_size: patches per side of a block.
        device: of the result; the host sends one small table and waits for nothing.
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
    """A convolution whose kernel is a whole patch: one product. Replicated: at most half a percent of a tower.

    Args:
        kernel: channels, (frames,) rows and columns of a patch.
        hidden_size: of the result.
        dtype: of the weight.
        bias: add one.
    """

    def __init__(self, kernel: Sequence[int], hidden_size: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.weight = declare(torch.nn.Parameter(torch.empty(hidden_size, *kernel, dtype=dtype)), "matrix", normal)
        self.bias = (
            declare(torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype)), "vector", zeros) if bias else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[P, patch features] to [P, hidden size]."""
        return linear(pixel_values.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def encode_packed(
    tower: Any, projector: Any, pixels: torch.Tensor | None, grids: Sequence[Grid], divided_over: Group | None
) -> list[torch.Tensor]:
    """`projector(*tower(pixels, grids))` of a micro-batch's images and videos.

    Args:
        tower: takes packed patches and grids; its `config` has sizes.
        projector: takes what the tower returns, and returns one or more tensors [features, H].
        pixels: [P, patch features], the same on every tensor rank; they may be on the host. None encodes one blank
            image, whose features nobody reads.
        grids: frames, rows and columns of patches of each image or video.
        divided_over: ranks that each hold both whole and encode a share of the frames; None encodes all here.

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
    # Multiply-adds of a layer: linear ones in proportion to patches, attention to their square.
    costs = [count * (config.layer_weights + 2 * count * config.hidden_size) for count in patches]
    division = ImageDivision(patches, costs, divided_over)
    own_frames = [frames[index] for index in division.own] or blank
    features = projector(*tower(division.take(pixels, merge**2), own_frames))
    # One exchange for all levels.
    return list(division.gather(torch.cat(features, dim=1), merge**2).chunk(len(features), dim=1))
