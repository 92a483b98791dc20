"""Micro-batches of a family without exchanges between ranks, and what transformers computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from megatron_vlm.data.collate import MicroBatch
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import expected
from tests.parity.tiny_batches import Reference

# fp32 sums in another order; the worst seen in tests/parity over all layouts is 5e-6.
TOLERANCE = 1e-4

Gradients = dict[str, torch.Tensor]


def references(family: TinyFamily, cases: Sequence[str]) -> list[Reference]:
    """A micro-batch of each case, another one for each time that a case is named."""
    return [family.micro_batch(case, cases[:seed].count(case), seed) for seed, case in enumerate(cases)]


def micro_batches(family: TinyFamily, cases: Sequence[str]) -> list[MicroBatch]:
    """See `references`."""
    return [reference.batch for reference in references(family, cases)]


@cache
def loss_sum_gradients(family: TinyFamily, cases: tuple[str, ...]) -> Gradients:
    """Gradients of the sum of all token losses, under our names, of the parameters that it depends on."""
    of_mean = expected(family.model(), references(family, cases))
    return {name: gradient * of_mean.label_tokens for name, gradient in of_mean.gradients.items() if gradient.any()}


def label_tokens(family: TinyFamily, cases: Sequence[str]) -> int:
    """How many tokens of the micro-batches are trained."""
    return int(sum((batch.labels != -100).sum() for batch in micro_batches(family, cases)))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value; our vocabulary padding is left out.

    Some of ours have one more dimension than transformers', over the same numbers.
    """
    if ours.numel() != theirs.numel():
        assert not ours[theirs.shape[0] :].any(), "a gradient in the vocabulary padding"
        ours = ours[: theirs.shape[0]]
    return ((ours.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max()).item()
