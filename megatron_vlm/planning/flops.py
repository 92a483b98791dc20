"""Model FLOPs of micro-batches: what a forward and backward pass needs in any layout, for FLOP/s and MFU.

Counted are matrix products, at two operations per multiply-add; norms, activations, softmax, rotary positions and
look-ups are not. Padding is not counted, nor keys that a query cannot see, nor what is computed twice. The count is
linear in a few lengths of a micro-batch; a trace of the whole model on one rank gives the factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.families.registry import Family
from megatron_vlm.layers.embedding import padded_vocab_size
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.recorder import Counts, fake_tensors
from megatron_vlm.planning.trace import ChunkCounts, Tracer

_TRACED_TOKENS = 128


@dataclass
class ModelFlops:
    """Counts FLOPs of a model's micro-batches.

    Attributes:
        family: of the model.
        model_config: the family's configuration of the model.
        trainable: which parameters train.
        groups: this rank's, of which only the group of itself is used.
    """

    family: Family
    model_config: VisionLanguageConfig
    trainable: Trainable
    groups: ProcessGroupCollection

    def lengths(self, batch: MicroBatch) -> list[int]:
        """What the count depends on; may be added up over micro-batches and data-parallel ranks.

        Args:
            batch: on the host, so that counting waits for no device. Pixels, which later pipeline stages do not have,
                are not read.

        Returns:
            Of a micro-batch without images: tokens, and pairs of a query and a key that it sees within each window of
            the decoder's layers. The same of one with images. Patches, and pairs of patches of one frame.
        """
        is_real = batch.document_ids >= 0
        text = [int(is_real.sum()), *(visible_keys(batch, is_real, window) for window in self._windows)]
        nothing, grids = [0] * len(text), batch.grids
        patches = sum(frames * height * width for frames, height, width in grids)
        pairs = sum(frames * (height * width) ** 2 for frames, height, width in grids)
        return [*(nothing if grids else text), *(text if grids else nothing), patches, pairs]

    def of(self, lengths: Iterable[float]) -> float:
        """FLOPs of micro-batches with these lengths, over all ranks that share them; takes a second the first time."""
        return sum(length * factor for length, factor in zip(lengths, self.factors, strict=True))

    @cached_property
    def factors(self) -> list[int]:
        """FLOPs for each unit of the lengths."""
        text = self.model_config.text
        batches, traces = self._trace()
        tokens, *pairs = self.lengths(batches[0])[: 1 + len(self._windows)]
        outside = _outside(traces[0])
        factors = []
        for trace in traces:
            assert trace.head is not None
            # Rows of the head that pad the vocabulary are not needed.
            head = _products(trace.head) * text.vocab_size // padded_vocab_size(text.vocab_size)
            factors.append((outside[0] + head + sum(map(_products, trace.layers.values()))) // tokens)
            for window, seen in zip(self._windows, pairs, strict=True):
                layers = (counts for index, counts in trace.layers.items() if text.layers[index].window == window)
                factors.append(sum(map(_attention, layers)) // seen)
        patches, patch_pairs = self.lengths(batches[1])[-2:]
        products, attention = (total - of_text for total, of_text in zip(_outside(traces[1]), outside, strict=True))
        return [*factors, products // max(1, patches), attention // max(1, patch_pairs)]

    @cached_property
    def _windows(self) -> list[int | None]:
        return list(dict.fromkeys(layer.window for layer in self.model_config.text.layers))

    def _trace(self) -> tuple[list[MicroBatch], list[ChunkCounts]]:
        """The whole model on this rank, without images and with one."""
        single, tracer = copy(self.groups), Tracer()
        for name, group in vars(self.groups).items():
            setattr(single, name, None if group is None else self.groups.single_rank)
        settings = BuildSettings(Layout.over(1, num_layers=len(self.model_config.text.layers)))
        with fake_tensors():
            (chunk,) = build_chunks(self.family, self.model_config, settings, single, torch.device("cpu"))
            self.trainable.freeze([chunk])
            rules = self.family.prompt_rules(self.model_config)
            batches = [example_batch(self.model_config, rules, 1, _TRACED_TOKENS, images) for images in (0, 1)]
            return batches, [tracer.trace(chunk, batch) for batch in batches]


def visible_keys(batch: MicroBatch, is_real: torch.Tensor, window: int | None) -> int:
    """Pairs of a real query and a key that it sees in a layer with this window."""
    low = batch.span_low
    if window is not None:
        places = torch.arange(low.shape[1], dtype=low.dtype, device=low.device)
        low = torch.maximum(low, places - (window - 1))
    return int(((batch.span_high - low + 1) * is_real).sum())


def _products(counts: Counts) -> int:
    """FLOPs of products that are not attention's."""
    return counts.flops.total() - counts.attention_flops.total()


def _attention(counts: Counts) -> int:
    """FLOPs that attention needs; of its five products backward, one computes scores again."""
    return counts.attention_flops["forward"] + counts.attention_flops["backward"] * 4 // 5


def _outside(trace: ChunkCounts) -> tuple[int, int]:
    """FLOPs of products and of attention outside of decoder layers and head."""
    inside = [*trace.layers.values(), trace.head or Counts()]
    products, attention = (of(trace.total) - sum(map(of, inside)) for of in (_products, _attention))
    return products, attention
