"""Collate samples into one padded micro-batch, with the span metadata that attention works from.

A row of the micro-batch holds one or several documents, each of which is a sample: they do not attend to each other,
and each counts its positions from zero.

Shapes: B rows, S padded length in tokens, D documents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vlm.data.context_facts import ContextShard
from megatron_vlm.data.media import Grid, Medium
from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rules import PromptRules

NO_LOSS = -100
"""Label of a position without a target, as in torch's cross entropy."""


@dataclass(frozen=True)
class LoadedSample:
    """A sample in its slot of the plan; where a row cannot be used, a padding sample that trains nothing."""

    sample: Sample
    source: int
    row_name: str
    bad: bool = False
    too_long: bool = False
    truncated: bool = False
    problem: str | None = None
    unknown_keys: tuple[str, ...] = ()


@dataclass
class MicroBatch:
    """The input of one forward pass of one data-parallel rank: documents and their media."""

    input_ids: torch.Tensor
    """[B, S] int64, padded on the right."""
    labels: torch.Tensor
    """[B, S] int64: labels[b, s] is the target of position s, in the same document; -100 has no loss."""
    position_ids: torch.Tensor
    """int64: [B, S], 0, 1, 2, ... in every document; or [3, B, S], time, height and width, where the family has
    positions on three axes. 0 on padding."""
    document_ids: torch.Tensor
    """[B, S] int32: document of each token, 0 to D-1 over the micro-batch; -1 on padding."""
    span_low: torch.Tensor
    """[B, S] int32: first key a query may see, before any window."""
    span_high: torch.Tensor
    """[B, S] int32: last key a query may see."""
    feature_index: torch.Tensor
    """[B, S] int32: row of the micro-batch's features that replaces this token; -1 on text. Features of images and
    videos come first, in reading order, and then those of audio."""
    media_inputs: dict[str, torch.Tensor]
    """Inputs of the towers for all media in reading order, by name (`media.Packed`). A name is missing where no medium
    needs it, and on pipeline stages that do not begin its tower."""
    document_sources: torch.Tensor
    """[D] int32: index of each document's data source."""
    document_names: list[str] = field(default_factory=list)
    """File and line of each document."""
    media: list[Medium] = field(default_factory=list)
    """All media in reading order, also without `media_inputs`."""
    counters: dict[str, int] = field(default_factory=dict)
    """samples, bad_rows, too_long_rows, truncated_rows (samples, of one row of the data each), empty_answers, images,
    videos, audio_clips, and tokens: real_tokens, label_tokens, padded_tokens, media_tokens."""
    problems: list[str] = field(default_factory=list)
    """One line for each bad or too long sample."""
    unknown_keys: dict[tuple[int, str], str] = field(default_factory=dict)
    """Name of the first row with each key that means nothing, by source and key."""
    empty_answers: dict[int, str] = field(default_factory=dict)
    """File and line of the first document with an empty answer, by the index of its source."""
    num_image_features: int = 0
    """Features of images and videos that tokens stand for, which `feature_index` counts first."""
    context: ContextShard | None = None
    """Where the tokens of a context rank's shard lie, whose S is smaller than that of the full micro-batch; media,
    documents and counters are those of the full one, and `feature_index` counts the features that the rank receives.
    None for a full micro-batch."""
    label_index: torch.Tensor = field(init=False)
    """int64: the flat positions s * B + b that have a label, ascending. Made from `labels` while they are on the
    host, which would have to wait for a device to count them."""
    document_lengths: tuple[int, ...] = field(init=False)
    """Tokens of each document, row after row; the padding of a row counts as one. Made on the host, too, and unused in
    a context rank's shard."""
    sees_ahead: bool = field(init=False)
    """Whether some query sees a later key, within an image. Made and unused likewise."""

    def __post_init__(self) -> None:
        self.label_index = (self.labels.t().flatten() != NO_LOSS).nonzero().squeeze(1)
        begins = torch.ones_like(self.document_ids, dtype=torch.bool)
        begins[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        starts = np.append(begins.flatten().nonzero().squeeze(1).numpy(), begins.numel())
        self.document_lengths = tuple(np.diff(starts).tolist())
        self.sees_ahead = bool((self.span_high > torch.arange(self.span_high.shape[1])).any())

    @property
    def grids(self) -> list[Grid]:
        """Frames, height and width in patches of each image and video, in reading order."""
        return [medium.grid for medium in self.media if medium.kind != "audio"]

    @property
    def audio_frames(self) -> list[int]:
        """Frames of each clip of audio, in reading order."""
        return [medium.grid[0] for medium in self.media if medium.kind == "audio"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """Return the micro-batch with its tensors on `device`, except `media_inputs`.

        Pixels are most of a step's data; the model moves those of one micro-batch when it encodes them.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """Return the micro-batch in page-locked memory; torch's loader calls this."""
        pinned = self._map(torch.Tensor.pin_memory)
        pinned.media_inputs = {name: value.pin_memory() for name, value in self.media_inputs.items()}
        return pinned

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        mapped = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(mapped, name, function(value))
            elif isinstance(value, ContextShard):
                mapped.context = value.map(function)
        return mapped


def collate(
    rows: Sequence[Sequence[LoadedSample]],
    rules: PromptRules,
    padding_token_id: int,
    pad_to_multiple_of: int = 1,
) -> MicroBatch:
    """Build one micro-batch from samples.

    Args:
        rows: the samples of each row, which become its documents; at least one each.
        rules: the family's prompt rules.
        padding_token_id: id written on padding.
        pad_to_multiple_of: S is a multiple of this (the tensor-parallel size under sequence parallelism).
    """
    documents = [document for row in rows for document in row]
    longest = max(sum(len(document.sample.input_ids) for document in row) for row in rows)
    padded_length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), padded_length), padding_token_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, NO_LOSS)
    document_ids = torch.full_like(input_ids, -1, dtype=torch.int32)
    positions = [_positions(document.sample, rules) for document in documents]
    position_ids = torch.zeros((*positions[0].shape[:-1], *input_ids.shape), dtype=torch.int64)
    number = 0
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            ids, trained = document.sample.input_ids, document.sample.trained
            assert len(ids), f"{document.row_name or 'a padding sample'} has no tokens"
            end = start + len(ids)
            input_ids[b, start:end] = torch.from_numpy(ids)
            labels[b, start : end - 1] = torch.from_numpy(np.where(trained, ids, NO_LOSS)[1:])
            document_ids[b, start:end] = number
            position_ids[..., b, start:end] = positions[number]
            start, number = end, number + 1
    is_real = document_ids >= 0
    is_vision, is_audio = (
        is_real & torch.isin(input_ids, torch.tensor(ids, dtype=torch.int64)) for ids in rules.tower_token_ids
    )
    span_low, span_high = spans(document_ids, is_vision if rules.bidirectional_images else torch.zeros_like(is_vision))
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        document_ids=document_ids,
        span_low=span_low,
        span_high=span_high,
        feature_index=_feature_index(is_vision, is_audio),
        num_image_features=int(is_vision.sum()),
        media_inputs=_join_media_inputs(documents),
        document_sources=torch.tensor([document.source for document in documents], dtype=torch.int32),
        document_names=[document.row_name for document in documents],
        media=[medium for document in documents for medium in document.sample.media],
        counters=_count(documents, labels, is_real, is_vision | is_audio),
        problems=[document.problem for document in documents if document.problem],
        unknown_keys={
            (document.source, key): document.row_name
            for document in reversed(documents)
            for key in document.unknown_keys
        },
        empty_answers={
            document.source: document.row_name for document in reversed(documents) if document.sample.empty_answers
        },
    )


def _count(
    documents: Sequence[LoadedSample], labels: torch.Tensor, is_real: torch.Tensor, is_medium: torch.Tensor
) -> dict[str, int]:
    """Compute the micro-batch's counters."""
    num_real = int(is_real.sum())
    return {
        "samples": len(documents),
        "bad_rows": sum(document.bad for document in documents),
        "too_long_rows": sum(document.too_long for document in documents),
        "truncated_rows": sum(document.truncated for document in documents),
        "empty_answers": sum(document.sample.empty_answers for document in documents),
        "images": sum(document.sample.count("image") for document in documents),
        "videos": sum(document.sample.count("video") for document in documents),
        "audio_clips": sum(document.sample.count("audio") for document in documents),
        "real_tokens": num_real,
        "label_tokens": int((labels != NO_LOSS).sum()),
        "padded_tokens": labels.numel() - num_real,
        "media_tokens": int(is_medium.sum()),
    }


def spans(document_ids: torch.Tensor, sees_ahead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the first and last key that each query may see, before any window.

    A query sees its document from the start up to itself, and, where it sees ahead, up to the end of its block. A block
    is a maximal run of such tokens in a document: two images without a token between them are one block, as in
    transformers.

    Args:
        document_ids: [B, S] integers that differ between neighbouring documents; -1 on padding.
        sees_ahead: [B, S] bool, true on image tokens that see their block in both directions.

    Returns:
        low and high, each [B, S] int32, inclusive; padding sees only itself.

    Source: `get_block_sequence_ids_for_mask` in transformers/models/gemma3/modeling_gemma3.py.
    """
    length = document_ids.shape[1]
    positions = torch.arange(length).expand_as(document_ids)
    begins = torch.ones_like(sees_ahead)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    document_start = torch.where(begins, positions, 0).cummax(1).values
    low = torch.where(document_ids >= 0, document_start, positions)
    goes_on = torch.nn.functional.pad(sees_ahead[:, 1:] & ~begins[:, 1:], (0, 1))
    block_end = torch.where(sees_ahead & ~goes_on, positions, length)
    # The nearest block end at or after each position.
    block_end = block_end.flip(1).cummin(1).values.flip(1)
    high = torch.where(sees_ahead, block_end, positions)
    return low.int(), high.int()


def _feature_index(*towers: torch.Tensor) -> torch.Tensor:
    """Number features in reading order, tower after tower, given the tokens [B, S] bool that stand for them."""
    index, start = torch.full_like(towers[0], -1, dtype=torch.int32), 0
    for stands_for_feature in towers:
        ends = stands_for_feature.flatten().cumsum(0).view_as(stands_for_feature)
        index = torch.where(stands_for_feature, start + ends.int() - 1, index)
        start += int(ends[-1, -1])
    return index


def _positions(sample: Sample, rules: PromptRules) -> torch.Tensor:
    """Return the positions of a document's tokens, [tokens] or [axes, tokens]."""
    if rules.position_ids is None:
        return torch.arange(len(sample.input_ids))
    return torch.from_numpy(rules.position_ids(sample.input_ids, sample.media))


def _join_media_inputs(documents: Sequence[LoadedSample]) -> dict[str, torch.Tensor]:
    inputs: dict[str, list[torch.Tensor]] = {}
    for document in documents:
        for name, value in document.sample.media_inputs.items():
            inputs.setdefault(name, []).append(value)
    # Pixels are large, so those of a single document are not copied.
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in inputs.items()}
