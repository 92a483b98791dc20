"""Random micro-batches of text, images and videos of any size, for families that pack patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from megatron_vlm.data.collate import NO_LOSS, LoadedSample, MicroBatch, collate
from megatron_vlm.data.media import Grid, Medium
from megatron_vlm.data.prompts import Sample
from megatron_vlm.families import registry

Part = int | tuple[int] | tuple[int, int] | tuple[int, int, int]
"""Text tokens; or the frames of a clip of audio; or an image's rows and columns of patches; or a video's frames, rows
and columns."""
Document = Sequence[Part]
Rows = Sequence[Document]
"""One document in each row."""
PackedRows = Sequence[Sequence[Document]]
"""Several documents in each row."""
Random = np.random.Generator


@dataclass(frozen=True)
class Reference:
    """One micro-batch as both sides take it; each of our documents is a row of its own for transformers."""

    batch: MicroBatch
    inputs: dict[str, torch.Tensor]


def documents_of(batch: MicroBatch, values_BS: torch.Tensor) -> list[torch.Tensor]:
    """Values of the tokens of each document, [its tokens, ...]."""
    return [values_BS[batch.document_ids == number] for number in range(len(batch.document_sources))]


def by_document(batch: MicroBatch, values_BS: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The same as rows of one length, [documents, longest, ...]."""
    return pad_sequence(documents_of(batch, values_BS), batch_first=True, padding_value=padding)


def text_inputs(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """What every model of transformers takes for the tokens of a micro-batch."""
    return {
        "input_ids": by_document(batch, batch.input_ids),
        "attention_mask": by_document(batch, torch.ones_like(batch.input_ids)),
    }


def pieces(samples: Sequence[Sample], kind: str) -> list[tuple[Grid, torch.Tensor]]:
    """Grid, and patches or frames, of each medium of a kind."""
    found = []
    for sample in samples:
        media = [medium for medium in sample.media if (medium.kind == "audio") == (kind == "audio")]
        if not media:
            continue
        inputs = sample.media_inputs["audio_features" if kind == "audio" else "pixel_values"]
        parts = inputs.split([math.prod(medium.grid) for medium in media])
        found += [(medium.grid, part) for medium, part in zip(media, parts, strict=True) if medium.kind == kind]
    return found


@dataclass(frozen=True)
class DocumentWriter:
    """How a family writes documents.

    Attributes:
        first_special_id: smaller ids are text.
        patch_features: numbers in one patch; where all images have one size, in a whole one.
        write: tokens of an image or video: (frames, rows, columns, is video, random numbers) to ids.
        frame_size: number of values in a frame of audio; None for a family without.
        write_audio: tokens of a clip, from its frames.
    """

    first_special_id: int
    patch_features: int
    write: Callable[[int, int, int, bool, Random], list[int]]
    frame_size: int | None = None
    write_audio: Callable[[int], list[int]] | None = None

    def text(self, count: int, generator: Random) -> list[int]:
        """Random tokens of text."""
        ids: list[int] = generator.integers(3, self.first_special_id, count).tolist()
        return ids

    def document(self, parts: Document, generator: Random) -> Sample:
        """A document of random tokens and pixels; some text tokens are trained, and the last token is."""
        ids: list[int] = []
        media: list[Medium] = []
        for part in parts:
            if isinstance(part, int):
                ids += self.text(part, generator)
                continue
            if len(part) == 1:
                assert self.write_audio is not None
                ids += self.write_audio(part[0])
                media.append(Medium("audio", (part[0], 1, 1)))
                continue
            is_video = len(part) == 3
            frames, height, width = part if len(part) == 3 else (1, *part)
            ids += self.write(frames, height, width, is_video, generator)
            media.append(Medium("video" if is_video else "image", (frames, height, width)))
        sample = Sample(np.array(ids, np.int64), np.zeros(0, bool), media)
        sample.trained = (generator.random(len(ids)) < 0.6) & (sample.input_ids < self.first_special_id)
        sample.trained[-1] = True
        sizes = {"pixel_values": self.patch_features, "audio_features": self.frame_size}
        for name, size in sizes.items():
            count = sum(math.prod(medium.grid) for medium in media if (medium.kind == "audio") == ("audio" in name))
            if count:
                inputs = generator.standard_normal((count, size), np.float32)
                sample.media_inputs[name] = torch.from_numpy(inputs)
        return sample


def collate_documents(
    documents: Sequence[Sample],
    config: PretrainedConfig,
    pad_to_multiple_of: int,
    documents_per_row: Sequence[int] | None = None,
) -> MicroBatch:
    """Collate by our own pipeline, whose positions and spans tests/data compares with transformers'.

    Args:
        documents: in order.
        config: of transformers.
        pad_to_multiple_of: see `collate`.
        documents_per_row: how many documents each row holds; None: one.
    """
    family = registry.detect(config)
    rules = family.prompt_rules(family.config_from_hf(config, text_only=False))
    placed = [LoadedSample(sample, 0, f"document {number}") for number, sample in enumerate(documents)]
    bounds = accumulate(documents_per_row or [1] * len(placed), initial=0)
    return collate([placed[start:end] for start, end in pairwise(bounds)], rules, 0, pad_to_multiple_of)


def reference(model: PreTrainedModel, micro_batch: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [documents, longest, V], and the sum of token losses, by transformers."""
    logits = model(**micro_batch.inputs).logits
    labels = by_document(micro_batch.batch, micro_batch.batch.labels, NO_LOSS).flatten()
    return logits, cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=NO_LOSS, reduction="sum")


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
