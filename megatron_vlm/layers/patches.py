"""Patches of images and videos of any size, packed into one sequence.

Patches are stored in blocks of merge x merge, each of which makes one token of the language model: blocks in raster
order, and raster order inside each.

Shapes: P patches, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn.functional import linear

from megatron_vlm.data.context_facts import ContextShard
from megatron_vlm.layers.context_exchange import exchange_features
from megatron_vlm.layers.linear import Group
from megatron_vlm.model_configs import ImageEncoderConfig
from megatron_vlm.parallel.images import ImageDivision
from megatron_vlm.parallel.parameters import declare, normal, zeros
from vlm_kernels.packed_attention import Segments

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
        self.weight = declare(torch.nn.Parameter(torch.empty(hidden_size, *kernel, dtype=dtype)), "filter", normal)
        self.bias = (
            declare(torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype)), "vector", zeros) if bias else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map [..., patch features] to [..., hidden size]."""
        return linear(pixel_values.to(self.weight.dtype), self.weight.flatten(1), self.bias)


@dataclass(frozen=True)
class PackedImages:
    """The frames of images and videos that this rank encodes, whose patches lie in one sequence.

    Attributes:
        frames: (1, height, width) in patches of each, known on the host; a blank one where there is none to encode.
        merge_size: patches per side of a block.
        device: device of the patches.
        division: how the frames are divided over ranks; None where every rank encodes all.
    """

    frames: tuple[Grid, ...]
    merge_size: int
    device: torch.device
    division: ImageDivision | None = None

    @classmethod
    def of(
        cls,
        config: ImageEncoderConfig,
        grids: Sequence[Grid],
        device: torch.device,
        divided_over: tuple[Group, Group] | None = None,
    ) -> PackedImages:
        """Return what this rank encodes of a micro-batch.

        Args:
            config: configuration of the tower.
            grids: frames, rows and columns of patches of each image or video.
            device: device of the patches.
            divided_over: the groups of tensor and of context ranks that each encode some of the frames.
        """
        frames, division = split_frames(grids), None
        if divided_over is not None and max(group.size() for group in divided_over) > 1 and frames:
            patches = [math.prod(frame) for frame in frames]
            # Multiply-adds of a layer: those of linears grow with the number of patches, those of attention with its
            # square.
            costs = [count * (config.layer_weights + 2 * count * config.hidden_size) for count in patches]
            division = ImageDivision(patches, costs, *divided_over)
            frames = [frames[index] for index in division.own]
        return cls(tuple(frames) or (config.blank_frame,), config.spatial_merge_size, device, division)

    @property
    def num_patches(self) -> int:
        """Number of patches that this rank encodes."""
        return sum(map(math.prod, self.frames))

    @cached_property
    def positions(self) -> PatchPositions:
        """Positions of the patches in their frames."""
        return patch_positions(self.frames, self.merge_size, self.device)

    @cached_property
    def segments(self) -> Segments:
        """Frames as segments of the sequence: a patch attends to its own."""
        return Segments(tuple(map(math.prod, self.frames)), self.device)

    def take(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return rows of the pixels of the frames that this rank encodes, or of a blank frame in zeros.

        Args:
            pixels: pixels of all frames, the same on every rank; a row is a patch or an image.
        """
        if self.division is None:
            return pixels
        patches_per_row = sum(self.division.patches) // len(pixels)
        return self.division.take(pixels, patches_per_row, self.num_patches // patches_per_row)

    def gather(self, features: Sequence[torch.Tensor], context: ContextShard | None) -> list[torch.Tensor]:
        """Return the features [T, H] of all frames, or those that a context rank's tokens stand for.

        Args:
            features: of the frames that this rank encodes.
            context: this context rank's shard of the micro-batch.
        """
        if self.division is None:
            return list(features)
        # One exchange gathers all of the projector's outputs.
        gathered = self.division.gather(torch.cat(tuple(features), dim=1), self.merge_size**2)
        if context is not None:
            encoded_by = self.division.context_ranks(self.merge_size**2)
            gathered = exchange_features(gathered, encoded_by, context, self.division.context_group)
        return list(gathered.chunk(len(features), dim=1))
