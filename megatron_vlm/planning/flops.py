"""Model FLOPs of micro-batches: what a forward and backward pass needs in any layout, for FLOP/s and MFU.

Matmuls are counted, at two FLOPs per multiply-add; norms, activations, softmax, rotary positions and look-ups are not.
Nor are padding, keys that a query cannot see, and what is computed twice. The count is linear in a few lengths of a
micro-batch; a trace of the full model on one rank gives the factors.
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
# Of models that this process has counted: a trace takes a second.
_known_factors: dict[tuple[str, VisionLanguageConfig, tuple[str, ...]], list[int]] = {}


@dataclass
class ModelFlops:
    """Counts FLOPs of a model's micro-batches.

    Attributes:
        family: the model's family.
        model_config: the family's configuration of the model.
        trainable: which parameters train.
        groups: this rank's process groups, of which only `single_rank` is used.
    """

    family: Family
    model_config: VisionLanguageConfig
    trainable: Trainable
    groups: ProcessGroupCollection

    def lengths(self, batch: MicroBatch) -> list[int]:
        """Return the lengths that the count depends on; they add up over micro-batches and data-parallel ranks.

        Args:
            batch: a micro-batch on the host, so that counting waits for no device. Pixels, which later pipeline
                stages do not have, are not read.

        Returns:
            For a micro-batch without images: tokens, and pairs of a query and a key that it sees within each window of
            the decoder's layers. The same for one with images. Patches, and pairs of patches of one frame.
        """
        is_real = batch.document_ids >= 0
        text = [int(is_real.sum()), *(visible_keys(batch, is_real, window) for window in self._windows)]
        nothing, grids = [0] * len(text), batch.grids
        patches = sum(frames * height * width for frames, height, width in grids)
        pairs = sum(frames * (height * width) ** 2 for frames, height, width in grids)
        return [*(nothing if grids else text), *(text if grids else nothing), patches, pairs]

    def of(self, lengths: Iterable[float]) -> float:
        """Return the FLOPs of micro-batches with these lengths, over all their ranks; the first call takes a second."""
        return sum(length * factor for length, factor in zip(lengths, self.factors, strict=True))

    @property
    def factors(self) -> list[int]:
        """FLOPs per unit of each length."""
        key = self.family.name, self.model_config, self.trainable.entries
        if key not in _known_factors:
            _known_factors[key] = self._factors()
        return _known_factors[key]

    def _factors(self) -> list[int]:
        text = self.model_config.text
        batches, traces = self._trace()
        tokens, *pairs = self.lengths(batches[0])[: 1 + len(self._windows)]
        outside = _outside(traces[0])
        factors = []
        for trace in traces:
            assert trace.head is not None
            # Rows of the head that pad the vocabulary are not counted.
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
        """Trace the full model on this rank, without images and with one."""
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
    """Count the pairs of a real query and a key that it sees in a layer with this window."""
    low = batch.span_low
    if window is not None:
        positions = torch.arange(low.shape[1], dtype=low.dtype, device=low.device)
        low = torch.maximum(low, positions - (window - 1))
    return int(((batch.span_high - low + 1) * is_real).sum())


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
