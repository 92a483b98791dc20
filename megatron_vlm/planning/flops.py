"""Model FLOPs of micro-batches: what a forward and backward pass needs in any layout, for FLOP/s and MFU.

Matmuls are counted, at two FLOPs per multiply-add; norms, activations, softmax, rotary positions and look-ups are not.
Nor are padding, keys that a query cannot see, and what is computed twice. The count is linear in a few lengths of a
micro-batch; a trace of the full model on one rank gives the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.balance import TokenCosts
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.families.registry import Family
from megatron_vlm.layers.attention import masked_spans
from megatron_vlm.layers.embedding import padded_vocab_size
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.model_configs import AttentionKind, DecoderLayerConfig, ImageMask, VisionLanguageConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.recorder import Counts, fake_tensors
from megatron_vlm.planning.trace import ChunkCounts, Tracer
from vlm_kernels.span_attention import QueryShard, Spans

Media = tuple[bool, bool]
"""Whether a micro-batch has images or videos, and whether it has audio."""
NO_MEDIA, WITH_IMAGES, WITH_AUDIO, WITH_BOTH = (False, False), (True, False), (False, True), (True, True)
_TRACED_TOKENS = 128
_TRACED_AUDIO_TOKENS = 5040  # full chunks, of whichever size a tower attends in
# Of models that this process has counted: each of two to five traces takes a second.
_known_factors: dict[tuple[str, VisionLanguageConfig, tuple[str, ...]], list[int]] = {}


@dataclass
class ModelFlops:
    """Counts FLOPs of a model's micro-batches.

    Attributes:
        family: the model's family.
        model_config: the family's configuration of the model.
        trainable: which parameters train.
        groups: this rank's process groups.
    """

    family: Family
    model_config: VisionLanguageConfig
    trainable: Trainable
    groups: ProcessGroupCollection

    def lengths(self, batch: MicroBatch) -> list[int]:
        """Return the lengths that the count depends on; they add up over micro-batches, data and context ranks.

        Args:
            batch: a micro-batch on the host, so that counting waits for no device. Pixels, which later pipeline
                stages do not have, are not read.

        Returns:
            For a micro-batch without media: tokens, and pairs of a query and a key that it sees in each kind of the
            decoder's layers (window and image mask). The same for one with images; and for a model that takes audio,
            for one with audio, and for one with both. Patches, and pairs of patches of one frame; and for such a model
            tokens of audio.
        """
        is_real = batch.document_ids >= 0
        text = [int(is_real.sum()), *(visible_keys(batch, is_real, *mask) for mask in self._masks)]
        grids, clips, audio = batch.grids, batch.audio_frames, self.model_config.audio
        found = bool(grids), bool(clips)
        lengths = [length if media == found else 0 for media in self._media for length in text]
        if self.groups.cp.rank() > 0:  # media are counted once, tokens where they are
            grids, clips = [], []
        lengths.append(sum(frames * height * width for frames, height, width in grids))
        lengths.append(sum(frames * (height * width) ** 2 for frames, height, width in grids))
        if audio is not None:
            lengths.append(sum(-(-frames // audio.frames_per_token) for frames in clips))
        return lengths

    def of(self, lengths: Iterable[float]) -> float:
        """Return the FLOPs of micro-batches with these lengths, over all their ranks; the first call takes seconds."""
        return sum(length * factor for length, factor in zip(lengths, self.factors, strict=True))

    @property
    def factors(self) -> list[int]:
        """FLOPs per unit of each length."""
        key = self.family.name, self.model_config, self.trainable.entries
        if key not in _known_factors:
            _known_factors[key] = self._factors()
        return _known_factors[key]

    def token_costs(self) -> TokenCosts:
        """Return what rows of the data cost, of which packs are made that mostly have some medium of each kind."""
        kinds, masks, audio = len(self._media), len(self._masks), self.model_config.audio
        of_text, of_towers = self.factors[: kinds * (1 + masks)], self.factors[kinds * (1 + masks) :]
        token, *pairs = of_text[-1 - masks :]
        return TokenCosts(
            token=token,
            pair=tuple((window, pair) for (window, _), pair in zip(self._masks, pairs, strict=True)),
            patch=of_towers[0],
            patch_pair=of_towers[1],
            audio_frame=0 if audio is None else of_towers[2] // audio.frames_per_token,
        )

    def _factors(self) -> list[int]:
        text = self.model_config.text
        traces = self._traces()
        tokens, *pairs = self.lengths(traces[0][0])[: 1 + len(self._masks)]
        nothing = _outside(traces[0][1])
        factors = []
        for _, trace in traces[: len(self._media)]:
            assert trace.head is not None
            # Rows of the head that pad the vocabulary are not counted.
            head = _products(trace.head) * text.vocab_size // padded_vocab_size(text.vocab_size)
            factors.append((nothing[0] + head + sum(map(_products, trace.layers.values()))) // tokens)
            for mask, seen in zip(self._masks, pairs, strict=True):
                layers = (counts for index, counts in trace.layers.items() if _mask(text.layers[index]) == mask)
                factors.append(sum(map(_attention, layers)) // seen)
        batch, trace = traces[self._media.index(WITH_IMAGES)]
        patches = sum(math.prod(grid) for grid in batch.grids)
        patch_pairs = sum(math.prod(grid) ** 2 for grid in batch.grids)
        products, attention = (total - of_text for total, of_text in zip(_outside(trace), nothing, strict=True))
        factors += [products // max(1, patches), attention // max(1, patch_pairs)]
        if self.model_config.audio is not None:
            # What does not grow with a clip is left out: keys of relative positions, and gaps between packed clips.
            (short, _), (long, _) = (_outside(traces[index][1]) for index in (self._media.index(WITH_AUDIO), -1))
            factors.append((long - short) // _TRACED_AUDIO_TOKENS)
        return factors

    @cached_property
    def _media(self) -> list[Media]:
        """The kinds of micro-batches, by what media they have: gradients may pass the language model in some alone."""
        with_audio = [WITH_AUDIO, WITH_BOTH] if self.model_config.audio is not None else []
        return [NO_MEDIA, WITH_IMAGES, *with_audio]

    @property
    def _masks(self) -> tuple[AttentionKind, ...]:
        return self.model_config.text.attention_kinds

    def _traces(self) -> list[tuple[MicroBatch, ChunkCounts]]:
        """Trace the full model on this rank: each kind of micro-batch, and one with a clip of twice the length."""
        single, tracer = copy(self.groups), Tracer()
        for name, group in vars(self.groups).items():
            setattr(single, name, None if group is None else self.groups.single_rank)
        settings = BuildSettings(Layout.over(1, num_layers=len(self.model_config.text.layers)))
        examples = [(media, _TRACED_AUDIO_TOKENS) for media in self._media]
        if self.model_config.audio is not None:
            examples.append((WITH_AUDIO, 2 * _TRACED_AUDIO_TOKENS))
        with fake_tensors():
            (chunk,) = build_chunks(self.family, self.model_config, settings, single, torch.device("cpu"))
            self.trainable.freeze([chunk])
            rules = self.family.prompt_rules(self.model_config)
            batches = [
                example_batch(
                    self.model_config,
                    rules,
                    num_rows=1,
                    length=_TRACED_TOKENS,
                    images_per_row=has_images,
                    clips_per_row=has_audio,
                    clip_tokens=clip_tokens,
                )
                for (has_images, has_audio), clip_tokens in examples
            ]
            return [(batch, tracer.trace(chunk, batch)) for batch in batches]


def _mask(layer: DecoderLayerConfig) -> AttentionKind:
    return layer.window, layer.image_mask


def visible_keys(batch: MicroBatch, is_real: torch.Tensor, window: int | None, image_mask: ImageMask = "window") -> int:
    """Count the pairs of a real query and a key that it sees in a layer with this window and image mask."""
    context = batch.context
    shard = None if context is None else QueryShard(context.positions, context.num_tokens, context.block_starts)
    spans = masked_spans(Spans(batch.span_low, batch.span_high, shard), image_mask)
    return int(((spans.high - spans.first_key(window) + 1) * is_real).sum())


def _products(counts: Counts) -> int:
    """Return the FLOPs of matmuls outside attention."""
    return counts.flops.total() - counts.attention_flops.total()


def _attention(counts: Counts) -> int:
    """Return the FLOPs that attention needs: all but one of its five backward matmuls, which recomputes scores."""
    return counts.attention_flops["forward"] + counts.attention_flops["backward"] * 4 // 5


def _outside(trace: ChunkCounts) -> tuple[int, int]:
    """Return the FLOPs of matmuls and of attention outside the decoder layers and the head."""
    inside = [*trace.layers.values(), trace.head or Counts()]
    products, attention = (of(trace.total) - sum(map(of, inside)) for of in (_products, _attention))
    return products, attention
