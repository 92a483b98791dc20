"""Tiny models of each family with micro-batches, and what transformers computes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from megatron_vlm.data.collate import MicroBatch
from tests.parity import gemma3_tiny, mistral3_tiny, qwen3_vl_tiny
from tests.parity.battery import expected
from tests.parity.families import FAMILIES, TinyModel
from tests.parity.layouts import hf_gradients
from tests.parity.tiny_batches import Reference

# Softmax does not change when one number is added to all scores of a query: a key bias has no gradient.
ZERO_GRADIENT = "k_proj.bias"

# fp32 sums in another order; the worst seen in tests/parity over all layouts is 5e-6.
TOLERANCE = 1e-4

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gemma3:
    """A tiny Gemma 3."""

    with_vision: bool = True
    tied: bool = True
    vocabulary = gemma3_tiny.VOCABULARY

    @property
    def config(self) -> PreTrainedConfig:
        """Of transformers."""
        return gemma3_tiny.build(self.with_vision, self.tied).config

    def write(self, folder: Path) -> str:
        """The model as a Hugging Face directory."""
        gemma3_tiny.build(self.with_vision, self.tied).save_pretrained(folder)
        return str(folder)

    def micro_batches(self, cases: Sequence[str]) -> list[MicroBatch]:
        """One micro-batch of four rows per case."""
        return [gemma3_tiny.make_batch(gemma3_tiny.ROWS[case], seed=seed) for seed, case in enumerate(cases)]

    @cache  # noqa: B019
    def loss_sum_gradients(self, cases: tuple[str, ...]) -> Gradients:
        """Gradients of the sum of all token losses, under our names."""
        model = gemma3_tiny.build(self.with_vision, self.tied).train()
        for batch in self.micro_batches(cases):
            _, loss = gemma3_tiny.reference(model, batch)
            (loss * (batch.labels != -100).sum()).backward()
        return {name: gradient for name, gradient in hf_gradients(model).items() if gradient is not None}


@dataclass(frozen=True)
class PackedPatches:
    """A tiny model of a family that packs patches.

    Attributes:
        name: of its entry in tests/parity/families.py; ranks find it again by that.
        cases: global batches of rows, by name.
    """

    name: str
    cases: Mapping[str, Sequence[Any]] = field(compare=False, repr=False)

    @property
    def tiny(self) -> TinyModel:
        """The entry."""
        (tiny,) = (entry for entry in FAMILIES if entry.name == self.name)
        return tiny

    @property
    def config(self) -> PreTrainedConfig:
        """Of transformers."""
        return self.tiny.model().config

    @property
    def vocabulary(self) -> int:
        """Rows without padding."""
        return self.tiny.vocabulary

    def write(self, folder: Path) -> str:
        """The model as a Hugging Face directory."""
        return self.tiny.write(folder)

    def references(self, cases: Sequence[str]) -> list[Reference]:
        """One micro-batch of two rows per case, another one for each time that a case is named."""
        return [
            self.tiny.make_batch(self.cases[case][cases[:seed].count(case)], seed) for seed, case in enumerate(cases)
        ]

    def micro_batches(self, cases: Sequence[str]) -> list[MicroBatch]:
        """See `references`."""
        return [reference.batch for reference in self.references(cases)]

    @cache  # noqa: B019
    def loss_sum_gradients(self, cases: tuple[str, ...]) -> Gradients:
        """Gradients of the sum of all token losses, under our names."""
        of_mean = expected(self.tiny.model(), self.references(cases))
        return {name: gradient * of_mean.label_tokens for name, gradient in of_mean.gradients.items()}


GEMMA3 = Gemma3()
GEMMA3_TEXT = Gemma3(with_vision=False, tied=False)
QWEN3_VL = PackedPatches("Qwen3-VL", qwen3_vl_tiny.CASES)
QWEN3_VL_MOE = PackedPatches("Qwen3-VL-MoE", qwen3_vl_tiny.CASES)
MISTRAL3 = PackedPatches("Ministral3", mistral3_tiny.CASES)
Subject = Gemma3 | PackedPatches


def label_tokens(subject: Subject, cases: Sequence[str]) -> int:
    return int(sum((batch.labels != -100).sum() for batch in subject.micro_batches(cases)))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value; our vocabulary padding is left out.

    Some of ours have one more dimension than transformers', over the same numbers.
    """
    if ours.numel() != theirs.numel():
        assert not ours[theirs.shape[0] :].any(), "a gradient in the vocabulary padding"
        ours = ours[: theirs.shape[0]]
    return ((ours.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max()).item()
