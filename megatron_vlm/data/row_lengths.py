"""What each row of a data source takes in a batch: tokens, patches, frames of audio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rows import RowReader


@dataclass(frozen=True)
class RowLengths:
    """What the rows of a source take.

    Attributes:
        tokens: int32, of each row in a batch; 1 where it becomes a padding sample.
        patches: int32.
        patch_pairs: int64, pairs of patches of one image or frame.
        audio_frames: int32.
        status: uint8.
    """

    tokens: np.ndarray
    patches: np.ndarray
    patch_pairs: np.ndarray
    audio_frames: np.ndarray
    status: np.ndarray


def measure_rows(reader: RowReader) -> list[RowLengths]:
    """Return the lengths of all rows of a reader's sources, by reading every row."""
    measured = (
        [_measure(reader.read(source, row).sample) for row in range(rows.num_rows)]
        for source, rows in enumerate(reader.sources)
    )
    return [RowLengths(*np.array(lengths).T) for lengths in measured]


def _measure(sample: Sample) -> tuple[int, int, int, int, int]:
    grids = [medium.grid for medium in sample.media if medium.kind != "audio"]
    return (
        len(sample.input_ids),
        sum(map(math.prod, grids)),
        sum(frames * (height * width) ** 2 for frames, height, width in grids),
        sum(medium.grid[0] for medium in sample.media if medium.kind == "audio"),
        0,
    )
