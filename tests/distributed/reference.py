"""Tiny models of each family with micro-batches, and what transformers computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from megatron_vlm.data.collate import MicroBatch
from tests.parity import gemma3_tiny, qwen3_vl_tiny
from tests.parity.layouts import hf_gradients

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
class Qwen3VL:
    """A tiny Qwen3-VL."""

    moe: bool

    @property
    def config(self) -> PreTrainedConfig:
        """Of transformers."""
        return qwen3_vl_tiny.build_config(self.moe)

    def write(self, folder: Path) -> str:
        """The model as a Hugging Face directory."""
        qwen3_vl_tiny.build(self.moe).save_pretrained(folder)
        return str(folder)

    def references(self, cases: Sequence[str]) -> list[qwen3_vl_tiny.Reference]:
        """One micro-batch of two rows per case, another one for each time that a case is named."""
        return [
            qwen3_vl_tiny.make_batch(qwen3_vl_tiny.CASES[case][cases[:seed].count(case)], seed, moe=self.moe)
            for seed, case in enumerate(cases)
        ]

    def micro_batches(self, cases: Sequence[str]) -> list[MicroBatch]:
        """See `references`."""
        return [reference.batch for reference in self.references(cases)]

    @cache  # noqa: B019
    def loss_sum_gradients(self, cases: tuple[str, ...]) -> Gradients:
        """Gradients of the sum of all token losses, under our names."""
        model = qwen3_vl_tiny.build(self.moe).train()
        for reference in self.references(cases):
            qwen3_vl_tiny.reference(model, reference)[1].backward()
        return {name: gradient for name, gradient in hf_gradients(model).items() if gradient is not None}


GEMMA3 = Gemma3()
GEMMA3_TEXT = Gemma3(with_vision=False, tied=False)
QWEN3_VL, QWEN3_VL_MOE = Qwen3VL(moe=False), Qwen3VL(moe=True)
Subject = Gemma3 | Qwen3VL


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
