"""The two passes over a chunk of logits as operators; `reference` defines them."""

from __future__ import annotations

import torch

from vlm_kernels.library import define
from vlm_kernels.linear_cross_entropy import reference


def _statistics_shape(logits: torch.Tensor, labels: torch.Tensor, columns: int, softcap: float) -> torch.Tensor:
    return logits.new_empty((logits.shape[0], 3), dtype=torch.promote_types(logits.dtype, torch.float32))


def _nothing(
    logits: torch.Tensor, labels: torch.Tensor, factors: torch.Tensor, columns: int, softcap: float
) -> None: ...


vocabulary_statistics = define(
    "vocabulary_statistics(Tensor logits, Tensor labels, int columns, float softcap) -> Tensor",
    reference.vocabulary_statistics,
    _statistics_shape,
)
"""Compute each token's largest logit, sum of exponentials relative to it, and label's logit; see the reference.

Args:
    logits: [T, V], contiguous; fp32, fp16 or bf16.
    labels: [T] int64, counted from this rank's first column; another rank's lie outside of 0 .. columns - 1.
    columns: number of this rank's columns without padding.
    softcap: bound of the logits; 0 for none.

Returns:
    The three values of each token, [T, 3] fp32.
"""

logits_gradient_ = define(
    "logits_gradient_(Tensor(a!) logits, Tensor labels, Tensor factors, int columns, float softcap) -> ()",
    reference.logits_gradient_,
    _nothing,
)
"""Overwrite logits with the gradient with respect to them; see the reference.

Args:
    logits: [T, V] as in `vocabulary_statistics`.
    labels: as in `vocabulary_statistics`.
    factors: [T, 4] fp32: largest logit over all ranks, logarithm of the sum of exponentials relative to it, factor on
        the softmax, factor at the label.
    columns: number of this rank's columns without padding; the gradient of padding is 0.
    softcap: bound of the logits; 0 for none.
"""
