"""What each row of a data source takes in a batch: tokens, patches, frames of audio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
