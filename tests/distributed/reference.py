"""What transformers computes for some micro-batches, and how far a tensor is from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from megatron_vlm.data.collate import MicroBatch
from tests.parity import gemma3_tiny
from tests.parity.layouts import hf_gradients

# Softmax does not change when one number is added to all scores of a query: a key bias has no gradient.
ZERO_GRADIENT = "k_proj.bias"

# fp32 sums in another order; the worst seen in tests/parity over all layouts is 5e-6.
TOLERANCE = 1e-4


def micro_batches(cases: Sequence[str]) -> list[MicroBatch]:
    """One micro-batch of four rows per case."""
    return [gemma3_tiny.make_batch(gemma3_tiny.ROWS[case], seed=seed) for seed, case in enumerate(cases)]


def write_model(folder: Path, with_vision: bool = True, tied: bool = True) -> str:
    """The tiny model as a Hugging Face directory."""
    gemma3_tiny.build(with_vision, tied).save_pretrained(folder)
    return str(folder)


@cache
def loss_sum_gradients(cases: tuple[str, ...], with_vision: bool = True, tied: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of the sum of all token losses, under our names."""
    model = gemma3_tiny.build(with_vision, tied).train()
    for batch in micro_batches(cases):
        _, loss = gemma3_tiny.reference(model, batch)
        (loss * (batch.labels != -100).sum()).backward()
    return {name: gradient for name, gradient in hf_gradients(model).items() if gradient is not None}


def label_tokens(cases: Sequence[str]) -> int:
    return int(sum((batch.labels != -100).sum() for batch in micro_batches(cases)))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value; our vocabulary padding is left out."""
    if ours.shape != theirs.shape:
        assert not ours[theirs.shape[0] :].any(), "a gradient in the vocabulary padding"
        ours = ours[: theirs.shape[0]]
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
