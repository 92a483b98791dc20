"""Gemma 4: what the processor makes of a row is packed without its padding; what contradicts the text is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers.feature_extraction_utils import BatchFeature

from megatron_vlm.data.media import Medium, Packed
from megatron_vlm.errors import DataError
from megatron_vlm.families.gemma4.prompt import pack_media


def test_placeholders_must_be_those_of_the_media() -> None:
    """An image of 2 x 4 patches of one value in blocks of 2 x 2, and clips of 5 and 1 frames with padding."""
    columns, rows = np.meshgrid(np.arange(4), np.arange(2))
    places = torch.from_numpy(np.stack([columns, rows], -1).reshape(8, 2))
    output = BatchFeature(
        {
            "pixel_values": torch.cat([torch.arange(8.0), torch.zeros(1)]).view(1, 9, 1),
            "image_position_ids": torch.cat([places, torch.full((1, 2), -1)])[None],
            "input_features": [np.ones((6, 2)), np.full((6, 2), 2.0)],
            "input_features_mask": [np.arange(6) < 5, np.arange(6) < 1],
        }
    )
    i, a = 1, 3
    pack = partial(pack_media, row_name="rows.jsonl:7", pooling_size=2, most_patches=4, frames_per_token=4)
    tokens = {"image_token_id": i, "video_token_id": 2, "audio_token_id": a}

    def packed(*ids: int) -> Packed:
        return pack(output, np.array(ids), **tokens)

    inputs, media = packed(0, a, a, 0, i, i, 0, a)
    assert media == [Medium("image", (1, 2, 4)), Medium("audio", (5, 1, 1)), Medium("audio", (1, 1, 1))]
    assert inputs["pixel_values"].flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert inputs["audio_features"].tolist() == [[1, 1]] * 5 + [[2, 2]]
    for ids, reason in {
        (a, a, 0, i, i): r"runs of \[2\] placeholders of audio where \[2, 1\] features belong",
        (a, a, a, i, i): r"runs of \[3\]",
        (a, 0, a, a, i, i): r"runs of \[1, 2\]",
        (a, a, 0, i, i, 0, a, 0, a): r"runs of \[2, 1, 1\]",
        (a, a, 0, i, 0, a): "1 placeholders in a run where 2 features belong",
        (a, a, 0, a): "fewer runs of placeholders",
    }.items():
        with pytest.raises(DataError, match=f"{reason}.*rows.jsonl:7"):
            packed(*ids)
    output["input_features_mask"][1][:] = False
    with pytest.raises(DataError, match="clip 2 of audio is too short"):
        packed(a, a, i, i)
    output["image_position_ids"][0, 7] = -1
    output["image_position_ids"][0, 3] = -1
    with pytest.raises(DataError, match="an image of 2 x 3 patches, 2 x 2 of which are one token"):
        packed(a, a, i, i)


def test_merged_patches_and_raw_frames() -> None:
    """An image of 2 x 3 patches, each a token, and clips of 2 and 1 frames, each a token; then one merged amiss."""
    columns, rows = np.meshgrid(np.arange(3), np.arange(2))
    places = torch.from_numpy(np.stack([columns, rows], -1).reshape(6, 2))
    output = BatchFeature(
        {
            "pixel_values": torch.cat([torch.arange(6.0), torch.zeros(2)]).view(1, 8, 1),
            "image_position_ids": torch.cat([places, torch.full((2, 2), -1)])[None],
            "input_features": [np.ones((2, 2)), np.full((2, 2), 2.0)],
            "input_features_mask": [np.array([True, True]), np.array([True, False])],
        }
    )
    i, a = 1, 3
    limits = {"pooling_size": 1, "most_patches": 3, "frames_per_token": 1}
    tokens = {"image_token_id": i, "video_token_id": 2, "audio_token_id": a}

    def packed(*ids: int, **changes: int) -> Packed:
        return pack_media(output, np.array(ids), "rows.jsonl:7", **tokens, **(limits | changes))

    inputs, media = packed(a, a, 0, i, i, i, i, i, i, 0, a)
    assert media == [Medium("image", (1, 2, 3)), Medium("audio", (2, 1, 1)), Medium("audio", (1, 1, 1))]
    assert inputs["pixel_values"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert inputs["audio_features"].tolist() == [[1, 1], [1, 1], [2, 2]]
    with pytest.raises(DataError, match=r"runs of \[1, 1\] placeholders of audio where \[2, 1\] features belong"):
        packed(a, 0, i, i, i, i, i, i, 0, a)
    with pytest.raises(DataError, match="5 placeholders in a run where 6 features belong"):
        packed(a, a, 0, i, i, i, i, i, 0, a)
    with pytest.raises(DataError, match="an image of 3 patches per side, but the model knows places of 2"):
        packed(a, a, 0, i, i, i, i, i, i, 0, a, most_patches=2)
    output["image_position_ids"][0, 1] = 0
    output["image_position_ids"][0, 4:] = -1
    with pytest.raises(DataError, match=r"merges an image into 4 patches, which do not fill 2 x 3.*do_resize"):
        packed(a, a, 0, i, i, i, i, 0, a)
