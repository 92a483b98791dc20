"""Samples into one padded micro-batch with the span metadata that attention works from.

Shapes: B rows, S padded length in tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rules import PositionFunction, PromptRules
from megatron_vlm.data.visuals import VisionGrid

NO_LOSS = -100
"""Label of a position without a target, as in torch's cross entropy."""


@dataclass(frozen=True)
class PlacedSample:
    """A sample in its slot of the plan; a slot whose row cannot be used holds a filler without trained tokens."""

    sample: Sample
    source: int
    row_name: str
    bad: bool = False
    too_long: bool = False
    truncated: bool = False
    problem: str | None = None


@dataclass
class MicroBatch:
    """What one forward pass of one data-parallel rank reads."""

    input_ids: torch.Tensor
    """[B, S] int64, padded on the right."""
    labels: torch.Tensor
    """[B, S] int64: labels[b, s] is the target of position s; -100 has no loss."""
    position_ids: torch.Tensor
    """int64: [B, S], 0 .. S-1 in every row; or [3, B, S], time, height and width, where the family has positions on
    three axes (0 on padding)."""
    document_ids: torch.Tensor
    """[B, S] int32: 0 on text and images, -1 on padding."""
    span_low: torch.Tensor
    """[B, S] int32: first key a query may see, before any window."""
    span_high: torch.Tensor
    """[B, S] int32: last key a query may see."""
    feature_index: torch.Tensor
    """[B, S] int32: row of the micro-batch's vision features that replaces this token; -1 on text."""
    vision_inputs: dict[str, torch.Tensor]
    """Inputs of the vision tower, images along the first dimension; of images that vary in size the patches of all
    images and videos in reading order. Empty without images."""
    source_ids: torch.Tensor
    """[B] int32: index of each row's data source."""
    vision_grids: list[VisionGrid] = field(default_factory=list)
    """Frames, height and width in patches of each image or video in reading order, also without `vision_inputs`; empty
    for families whose images have one size."""
    row_names: list[str] = field(default_factory=list)
    """File and line of each row."""
    counters: dict[str, int] = field(default_factory=dict)
    """bad_rows, too_long_rows, truncated_rows, images, videos, and tokens: real_tokens, label_tokens, padded_tokens,
    vision_tokens."""
    problems: list[str] = field(default_factory=list)
    """One line for each bad or too long row."""
    label_index: torch.Tensor = field(init=False)
    """int64: the places s * B + b that have a label, ascending. Made from `labels` while they are on the host, which
    would have to wait for a device to count them."""

    def __post_init__(self) -> None:
        self.label_index = (self.labels.t().flatten() != NO_LOSS).nonzero().squeeze(1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The micro-batch with its tensors on `device`, except `vision_inputs`.

        Pixels are most of a step's data; the model moves those of one micro-batch when it encodes them.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The micro-batch in page-locked memory; torch's loader calls this."""
        pinned = self._map(torch.Tensor.pin_memory)
        pinned.vision_inputs = {name: value.pin_memory() for name, value in self.vision_inputs.items()}
        return pinned

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        mapped = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(mapped, name, function(value))
        return mapped


def collate(
    rows: Sequence[PlacedSample],
    rules: PromptRules,
    filler_token_id: int,
    pad_to_multiple_of: int = 1,
    with_pixels: bool = True,
) -> MicroBatch:
    """Pad rows to one micro-batch.

    Args:
        rows: the rows in order.
        rules: the family's prompt rules.
        filler_token_id: id written on padding.
        pad_to_multiple_of: S is a multiple of this (the tensor-parallel size under sequence parallelism).
        with_pixels: keep the vision inputs; pipeline stages other than the first read none.
    """
    lengths = torch.tensor([len(row.sample.input_ids) for row in rows])
    longest = int(lengths.max())
    padded_length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), padded_length), filler_token_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, NO_LOSS)
    for number, row in enumerate(rows):
        ids, trained = row.sample.input_ids, row.sample.trained
        input_ids[number, : len(ids)] = torch.from_numpy(ids)
        targets = np.where(trained, ids, NO_LOSS)
        labels[number, : len(ids) - 1] = torch.from_numpy(targets[1:])
    is_real = torch.arange(padded_length) < lengths[:, None]
    is_vision = is_real & torch.isin(input_ids, torch.tensor(rules.vision_token_ids, dtype=torch.int64))
    span_low, span_high = spans(is_real, is_vision if rules.bidirectional_images else torch.zeros_like(is_vision))
    feature_index = torch.where(is_vision, is_vision.flatten().cumsum(0).view_as(is_vision) - 1, -1)
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=_positions(rows, rules.position_ids, padded_length),
        document_ids=torch.where(is_real, 0, -1).int(),
        span_low=span_low,
        span_high=span_high,
        feature_index=feature_index.int(),
        vision_inputs=_join_vision_inputs(rows) if with_pixels else {},
        source_ids=torch.tensor([row.source for row in rows], dtype=torch.int32),
        vision_grids=[grid for row in rows for grid in row.sample.vision_grids],
        row_names=[row.row_name for row in rows],
        counters=_count(rows, labels, is_real, is_vision),
        problems=[row.problem for row in rows if row.problem],
    )


def _count(
    rows: Sequence[PlacedSample], labels: torch.Tensor, is_real: torch.Tensor, is_vision: torch.Tensor
) -> dict[str, int]:
    """The micro-batch's counters."""
    num_real = int(is_real.sum())
    return {
        "bad_rows": sum(row.bad for row in rows),
        "too_long_rows": sum(row.too_long for row in rows),
        "truncated_rows": sum(row.truncated for row in rows),
        "images": sum(row.sample.num_images for row in rows),
        "videos": sum(row.sample.num_videos for row in rows),
        "real_tokens": num_real,
        "label_tokens": int((labels != NO_LOSS).sum()),
        "padded_tokens": labels.numel() - num_real,
        "vision_tokens": int(is_vision.sum()),
    }


def spans(is_real: torch.Tensor, is_image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last key that each query may see, before any window.

    A query sees its row from the start up to itself, an image token up to the end of its block. A block is a maximal
    run of image tokens: two images without a token between them are one block, as in transformers.

    Args:
        is_real: [B, S] bool, false on padding.
        is_image: [B, S] bool, true on image tokens that see their block in both directions.

    Returns:
        low and high, each [B, S] int32, inclusive; padding sees only itself.

    Source: `get_block_sequence_ids_for_mask` in transformers/models/gemma3/modeling_gemma3.py.
    """
    length = is_real.shape[1]
    positions = torch.arange(length).expand_as(is_real)
    low = torch.where(is_real, 0, positions)
    next_is_image = torch.nn.functional.pad(is_image[:, 1:], (0, 1))
    block_end = torch.where(is_image & ~next_is_image, positions, length)
    # The nearest block end at or after each position.
    block_end = block_end.flip(1).cummin(1).values.flip(1)
    high = torch.where(is_image, block_end, positions)
    return low.int(), high.int()


def _positions(rows: Sequence[PlacedSample], position_ids: PositionFunction | None, length: int) -> torch.Tensor:
    if position_ids is None:
        return torch.arange(length).expand(len(rows), -1).contiguous()
    padded = []
    for row in rows:
        of_row = position_ids(row.sample.input_ids, row.sample.vision_grids)
        padded.append(np.pad(of_row, ((0, 0), (0, length - of_row.shape[1]))))
    return torch.from_numpy(np.stack(padded, axis=1))


def _join_vision_inputs(rows: Sequence[PlacedSample]) -> dict[str, torch.Tensor]:
    with_images = [row.sample.vision_inputs for row in rows if row.sample.vision_inputs]
    if not with_images:
        return {}
    if len(with_images) == 1:
        return dict(with_images[0])
    return {name: torch.cat([inputs[name] for inputs in with_images]) for name in with_images[0]}
