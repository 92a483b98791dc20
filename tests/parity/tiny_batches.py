"""Random micro-batches of text, images and videos of any size, for families that pack patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from megatron_vlm.data.collate import MicroBatch, PlacedSample, collate
from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.visuals import VisionGrid
from megatron_vlm.families import registry

Part = int | tuple[int, int] | tuple[int, int, int]
"""Text tokens; or an image's rows and columns of patches; or a video's frames, rows and columns."""
Rows = Sequence[Sequence[Part]]
Random = np.random.Generator


@dataclass
class TinyRow:
    """One row, and which of its grids are videos."""

    sample: Sample
    is_video: list[bool] = field(default_factory=list)

    def pieces(self, is_video: bool) -> list[tuple[VisionGrid, torch.Tensor]]:
        """Grid and patches of each image, or of each video."""
        grids = self.sample.vision_grids
        if not grids:
            return []
        patches = self.sample.vision_inputs["pixel_values"].split([math.prod(grid) for grid in grids])
        return [
            (grid, part) for grid, part, kind in zip(grids, patches, self.is_video, strict=True) if kind == is_video
        ]


@dataclass(frozen=True)
class Reference:
    """One micro-batch as both sides take it."""

    batch: MicroBatch
    inputs: dict[str, torch.Tensor]
    lengths: list[int]


@dataclass(frozen=True)
class RowWriter:
    """How a family writes rows.

    Attributes:
        first_special_id: smaller ids are text.
        patch_features: numbers in one patch; where all images have one size, in a whole one.
        write: tokens of an image or video: (frames, rows, columns, is video, random numbers) to ids.
    """

    first_special_id: int
    patch_features: int
    write: Callable[[int, int, int, bool, Random], list[int]]

    def text(self, count: int, generator: Random) -> list[int]:
        """Random tokens of text."""
        ids: list[int] = generator.integers(3, self.first_special_id, count).tolist()
        return ids

    def row(self, parts: Sequence[Part], generator: Random) -> TinyRow:
        """A row of random tokens and pixels; some text tokens are trained, and the last one is."""
        ids: list[int] = []
        row = TinyRow(Sample(np.zeros(0, np.int64), np.zeros(0, bool)))
        grids = row.sample.vision_grids
        for part in parts:
            if isinstance(part, int):
                ids += self.text(part, generator)
                continue
            is_video = len(part) == 3
            frames, height, width = part if len(part) == 3 else (1, *part)
            ids += self.write(frames, height, width, is_video, generator)
            grids.append((frames, height, width))
            row.is_video.append(is_video)
        row.sample.input_ids = np.array(ids, np.int64)
        row.sample.trained = (generator.random(len(ids)) < 0.6) & (row.sample.input_ids < self.first_special_id)
        row.sample.trained[-1] = True
        row.sample.num_images = len(grids)
        if grids:
            patches = sum(frames * height * width for frames, height, width in grids)
            pixels = generator.standard_normal((patches, self.patch_features), np.float32)
            row.sample.vision_inputs = {"pixel_values": torch.from_numpy(pixels)}
        return row


def collate_rows(rows: Sequence[TinyRow], config: PretrainedConfig, pad_to_multiple_of: int) -> MicroBatch:
    """By our own pipeline, whose positions tests/data compares with transformers'."""
    family = registry.detect(config)
    rules = family.prompt_rules(family.config_from_hf(config, text_only=False))
    placed = [PlacedSample(row.sample, 0, f"row {number}") for number, row in enumerate(rows)]
    return collate(placed, rules, 0, pad_to_multiple_of)


def reference(model: PreTrainedModel, micro_batch: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V], and the sum of token losses, by transformers."""
    logits = model(**micro_batch.inputs).logits
    labels = micro_batch.batch.labels.flatten()
    return logits, cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")


def randomise(model: PreTrainedModel, seed: int = 8) -> PreTrainedModel:
    """Random numbers everywhere: norms of one or zero, and zero biases and projectors, hide errors.

    What starts as ones is random around one; nothing else of what transformers draws is left.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_kernel = parameter.dim() > 3  # of a convolution over whole patches
            fan_in = parameter[0].numel() if is_kernel else parameter.shape[-1]
            is_ones = bool((parameter == 1).all())
            parameter.normal_(float(is_ones), 0.3 if parameter.dim() == 1 else fan_in**-0.5, generator=generator)
    return model
