"""Micro-batches against transformers' own masks and loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from megatron_vlm.data.collate import NO_LOSS, LoadedSample, MicroBatch, collate, spans
from megatron_vlm.data.media import Medium
from megatron_vlm.data.prompts import Sample
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.stage_loader import decode, encode
from tests.data.rows import assistant, image, row, user
from tests.families.gemma3 import GEMMA3
from tests.families.mistral3 import MISTRAL3
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily

ROWS = [
    row(user(image("0.png"), "and", image("3.png"), "?"), assistant("Two.")),
    row(user("Hello?"), assistant("I am fine.")),
    row(user(image("5.png")), assistant("One.")),
    row(user("nobody answers")),
]


@pytest.fixture
def reader(make_reader: Callable[..., RowReader]) -> RowReader:
    return make_reader(ROWS)


def make_batch(reader: RowReader, multiple: int = 1) -> MicroBatch:
    loaded = [reader.read(0, number) for number in range(len(ROWS))]
    return collate([[each] for each in loaded], reader.builder.rules, reader.builder.padding_token_id, multiple)


def test_shapes_types_and_counters(reader: RowReader) -> None:
    batch = make_batch(reader, multiple=16)
    samples = [reader.read(0, number).sample for number in range(4)]
    longest = max(len(sample.input_ids) for sample in samples)
    assert batch.input_ids.shape == (4, -(-longest // 16) * 16)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    int32 = (batch.document_ids, batch.span_low, batch.span_high, batch.feature_index, batch.document_sources)
    assert {tensor.dtype for tensor in int32} == {torch.int32}
    real = sum(len(sample.input_ids) for sample in samples)
    assert batch.counters == {
        "samples": 4,
        "bad_rows": 1,
        "too_long_rows": 0,
        "truncated_rows": 0,
        "empty_answers": 0,
        "images": 3,
        "videos": 0,
        "audio_clips": 0,
        "real_tokens": real,
        "label_tokens": sum(int(sample.trained.sum()) for sample in samples),
        "padded_tokens": batch.input_ids.numel() - real,
        "media_tokens": 12,
    }
    assert [name.rpartition(":")[2] for name in batch.document_names] == ["1", "2", "3", "4"]
    assert len(batch.problems) == 1 and "rows.jsonl:4" in batch.problems[0]
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def test_labels_give_the_loss_of_transformers(reader: RowReader) -> None:
    """Transformers takes labels at the token's own place and shifts them itself."""
    batch = make_batch(reader)
    samples = [reader.read(0, number).sample for number in range(4)]
    unshifted = torch.full_like(batch.input_ids, NO_LOSS)
    for number, sample in enumerate(samples):
        ids, trained = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.trained)
        unshifted[number, : len(ids)] = torch.where(trained, ids, NO_LOSS)
    vocabulary = len(reader.builder.tokenizer)
    logits = torch.randn(*batch.input_ids.shape, vocabulary, generator=torch.Generator().manual_seed(0))
    theirs = ForCausalLMLoss(logits, unshifted, vocabulary)
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=NO_LOSS)
    # The same function of the same numbers.
    assert torch.equal(ours, theirs)


def visible(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """[B, S query, S key] bool from spans."""
    keys = torch.arange(low.shape[1])
    return (keys >= low[..., None]) & (keys <= high[..., None])


def test_spans_equal_the_masks_of_transformers(reader: RowReader) -> None:
    """Global layers of Gemma 3: causal, or within the same image."""
    batch = make_batch(reader, multiple=8)
    assert_same_masks(batch.document_ids >= 0, batch.input_ids == 8, batch.span_low, batch.span_high)


def test_spans_of_random_image_runs() -> None:
    """Images at the edges of a row, one token long, and touching each other."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (64, 1), generator=generator)
    is_real = torch.arange(30) < lengths
    is_image = is_real & (torch.rand(64, 30, generator=generator) < 0.6)
    assert_same_masks(is_real, is_image, *spans(is_real.int() - 1, is_image))


def test_spans_of_packed_documents() -> None:
    """As each document alone, whatever image runs end it and begin the next; nothing is seen of other documents."""
    generator = torch.Generator().manual_seed(1)
    length = 40
    for _ in range(50):
        cuts = (torch.randperm(length - 1, generator=generator)[:5] + 1).sort().values.tolist()
        bounds = list(pairwise([0, *cuts]))
        document_ids = torch.full((1, length), -1)
        for number, (start, end) in enumerate(bounds):
            document_ids[0, start:end] = number
        is_image = (document_ids >= 0) & (torch.rand(1, length, generator=generator) < 0.6)
        low, high = spans(document_ids, is_image)
        seen = visible(low, high)
        for start, end in bounds:
            alone = (values[:, start:end] for values in (document_ids >= 0, is_image, low - start, high - start))
            assert_same_masks(*alone)
            assert seen[0, start:end].sum() == seen[0, start:end, start:end].sum()
        assert torch.equal(seen[document_ids < 0], torch.eye(length).bool()[document_ids[0] < 0])


@pytest.mark.parametrize("family", [GEMMA3, QWEN3_VL, MISTRAL3], ids=str)
def test_packed_documents_are_as_each_alone(family: TinyFamily) -> None:
    """Ids, labels, positions, spans, features and media, but for where a document lies in its row."""
    for seed, rows in enumerate(family.cases["packed"]):
        documents = [document for row in rows for document in row]
        packed = family.make_batch(documents, seed, documents_per_row=[len(row) for row in rows]).batch
        alone = family.make_batch(documents, seed).batch
        assert (packed.media, packed.document_names) == (alone.media, alone.document_names)
        assert torch.equal(packed.document_sources, alone.document_sources)
        assert packed.counters | {"padded_tokens": 0} == alone.counters | {"padded_tokens": 0}
        for name, pixels in alone.media_inputs.items():
            assert torch.equal(packed.media_inputs[name], pixels)
        is_padding = torch.ones_like(packed.input_ids, dtype=torch.bool)
        number = 0
        for b in range(len(rows)):
            start = 0
            for _ in rows[b]:
                length = int((alone.document_ids[number] >= 0).sum())
                here, there = (..., b, slice(start, start + length)), (..., number, slice(length))
                for name in ("input_ids", "labels", "position_ids", "document_ids", "feature_index"):
                    assert torch.equal(getattr(packed, name)[here], getattr(alone, name)[there])
                for name in ("span_low", "span_high"):
                    assert torch.equal(getattr(packed, name)[here] - start, getattr(alone, name)[there])
                is_padding[here] = False
                start, number = start + length, number + 1
        assert torch.equal(packed.document_ids == -1, is_padding) and (packed.labels[is_padding] == NO_LOSS).all()
        assert not packed.position_ids[..., is_padding].any()


def assert_same_masks(is_real: torch.Tensor, is_image: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    block = get_block_sequence_ids_for_mask(is_image.long())
    same_block = (block[:, :, None] == block[:, None, :]) & (block >= 0)[:, :, None]
    causal = torch.ones(is_real.shape[1], is_real.shape[1]).tril().bool()
    expected = (causal | same_block) & is_real[:, None, :]
    ours = visible(low, high)
    assert torch.equal(ours[is_real], expected[is_real])
    # Padding sees itself, so that no row of the softmax is empty.
    assert torch.equal(ours[~is_real], torch.eye(is_real.shape[1]).bool().expand_as(expected)[~is_real])


def test_features_go_to_their_own_tokens(reader: RowReader) -> None:
    batch = make_batch(reader)
    is_image = batch.input_ids == 8
    assert torch.equal(batch.feature_index[is_image], torch.arange(12, dtype=torch.int32))
    assert (batch.feature_index[~is_image] == -1).all()
    pixels = batch.media_inputs["pixel_values"]
    rows = [reader.read(0, number).sample.media_inputs.get("pixel_values") for number in range(4)]
    assert torch.equal(pixels, torch.cat([row for row in rows if row is not None]))
    # Four tokens per image: the first row's eight tokens take the first two images, the third row's the last.
    assert (batch.feature_index // 4)[2].max() == 2 and pixels.shape[0] == 3


def test_audio_has_features_of_its_own_behind_those_of_images() -> None:
    """Documents with images, a video, audio, several of them, and none; only images are seen in both directions."""
    image, video, audio = 5, 6, 7
    rules = PromptRules("", "", image, bidirectional_images=True, video_token_id=video, audio_token_id=audio)
    still, film, clip, tone = (
        Medium("image", (1, 2, 4)),
        Medium("video", (2, 2, 2)),
        Medium("audio", (6, 1, 1)),
        Medium("audio", (2, 1, 1)),
    )
    contents: list[list[tuple[list[int], list[Medium]]]] = [
        [([1, image, image, audio, audio, audio, 2], [still, clip]), ([audio, 3, video, video, 4], [tone, film])],
        [([1, 2, 3], []), ([audio, audio, audio, 4], [clip]), ([2, image, image], [still])],
    ]
    rows, sizes = [], {"image": ("pixel_values", 48), "video": ("pixel_values", 48), "audio": ("audio_frames", 10)}
    expected: dict[str, list[torch.Tensor]] = {"pixel_values": [], "audio_frames": []}
    for content in contents:
        rows.append([])
        for ids, media in content:
            sample = Sample(np.array(ids), np.ones(len(ids), bool), media)
            for medium in media:
                name, width = sizes[medium.kind]
                expected[name].append(torch.randn(math.prod(medium.grid), width))
                sample.media_inputs[name] = expected[name][-1]  # no document here has two media of one tower
            rows[-1].append(LoadedSample(sample, 0, "document"))
    batch = collate(rows, rules, padding_token_id=0, pad_to_multiple_of=4)
    assert batch.grids == [still.grid, film.grid, still.grid] and batch.audio_frames == [6, 2, 6]
    assert batch.media_inputs.keys() == expected.keys()
    for name, parts in expected.items():
        assert torch.equal(batch.media_inputs[name], torch.cat(parts))
    tokens = [(b, s) for b, ids in enumerate(batch.input_ids.tolist()) for s in range(len(ids))]
    of_images = [token for token in tokens if batch.input_ids[token] in (image, video)]
    of_audio = [token for token in tokens if batch.input_ids[token] == audio]
    features = of_images + of_audio
    for token in tokens:
        index = int(batch.feature_index[token])
        assert (features[index] if index >= 0 else None) == (token if token in features else None)
    sees_ahead = batch.span_high > torch.arange(batch.input_ids.shape[1])
    assert sees_ahead.nonzero().tolist() == [[0, 1], [0, 9], [1, 8]]  # the first of each two tokens of images


def test_stages_without_towers_see_the_same_tokens(reader: RowReader) -> None:
    """All that a later stage receives is what the first has read, but for the towers' inputs."""
    with_pixels = make_batch(reader)
    (without,) = decode(encode([with_pixels]))
    assert with_pixels.media_inputs and without.media_inputs == {}
    for name, value in vars(with_pixels).items():
        if isinstance(value, torch.Tensor):
            received = getattr(without, name)
            assert torch.equal(received, value) and received.dtype == value.dtype
        elif name != "media_inputs":
            assert getattr(without, name) == value
