"""Compares what the ranks of a layout computed with what transformers computed, for any family."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from megatron_vlm.data.collate import MicroBatch
from tests.parity.layouts import RankResult, TestLayout, hf_gradients, run_case
from tests.parity.tiny_batches import Reference, documents_of, reference
from tests.ranks import run_ranks

# fp32 sums in another order: one product of 32 to 250 terms differs by about 1e-7 relative, a network of 4 layers
# amplifies that to 1e-6 .. 1e-5. The largest error seen over all layouts is printed by `pytest -s`.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6
# A mistake that a case is to show must be at least three times as wrong.
CLEARLY_WRONG = 3 * LOGITS_TOLERANCE

# Softmax does not change when one number is added to all scores of a query: a key bias has no gradient.
ZERO_GRADIENT = "k_proj.bias"
ExtraLoss = Callable[[Reference], torch.Tensor] | None
VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


@dataclass
class Expected:
    """What transformers computes for a global batch.

    Attributes:
        micro_batches: the global batch.
        gradients: of the mean loss over all label tokens, by our names.
        logits: of each micro-batch, [documents, longest, V].
        loss_sum: over all label tokens.
        label_tokens: how many.
    """

    micro_batches: list[MicroBatch]
    gradients: dict[str, torch.Tensor]
    logits: list[torch.Tensor]
    loss_sum: float
    label_tokens: int


def expected(model: PreTrainedModel, micro_batches: Sequence[Reference], extra_loss: ExtraLoss = None) -> Expected:
    """Run transformers, micro-batch by micro-batch.

    Args:
        model: of transformers.
        micro_batches: a global batch.
        extra_loss: added to the sum of a micro-batch's token losses before the backward pass.
    """
    model.zero_grad()
    label_tokens = int(sum((each.batch.labels != -100).sum() for each in micro_batches))
    logits, loss_sum = [], 0.0
    for each in micro_batches:
        computed, loss = reference(model, each)
        loss_sum += loss.item()
        if extra_loss is not None:
            loss = loss + extra_loss(each)
        (loss / label_tokens).backward()
        logits.append(computed.detach())
    gradients = {
        name: torch.zeros(1) if gradient is None else gradient.clone() for name, gradient in hf_gradients(model).items()
    }
    return Expected([each.batch for each in micro_batches], gradients, logits, loss_sum, label_tokens)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value of the tensor."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def logits_errors(batch: MicroBatch, ours: torch.Tensor, theirs: torch.Tensor, vocabulary: int) -> list[float]:
    """Relative error of each document of a micro-batch.

    Args:
        batch: the micro-batch.
        ours: [B, S, padded vocabulary].
        theirs: [documents, longest, vocabulary].
        vocabulary: entries without padding.
    """
    own = ours[:, : batch.document_ids.shape[1]]  # context ranks pad rows further
    return [
        relative_error(found, right[: len(found)])
        for found, right in zip(documents_of(batch, own[..., :vocabulary]), theirs, strict=True)
    ]


def worst_logits(ours: Sequence[torch.Tensor], expected: Expected, vocabulary: int) -> float:
    """The worst document's error over a global batch on one rank."""
    each = zip(expected.micro_batches, ours, expected.logits, strict=True)
    return max(error for batch, found, right in each for error in logits_errors(batch, found, right, vocabulary))


def check_layout(
    layout: TestLayout, directory: str, cases: dict[str, Expected], vocabulary: int
) -> tuple[float, float]:
    """Run all cases in a layout and compare; returns the worst errors of logits and gradients."""
    batches = {name: case.micro_batches for name, case in cases.items()}
    ranks = run_ranks(layout.world_size, run_case, directory, layout, batches)
    worst = [
        check_case([rank[name] for rank in ranks], case, vocabulary, layout.freeze) for name, case in cases.items()
    ]
    return max(logits for logits, _ in worst), max(gradient for _, gradient in worst)


def check_case(
    ranks: Sequence[RankResult], expected: Expected, vocabulary: int, frozen: Sequence[str] = ()
) -> tuple[float, float]:
    """Compare what all ranks computed of one case; returns the worst errors of logits and gradients."""
    seen: dict[str, float] = {}
    worst_logits = 0.0
    data_size = 1 + max(result.data_rank for result in ranks)
    for result in ranks:
        assert result.label_tokens == expected.label_tokens
        assert result.loss_sum == pytest.approx(expected.loss_sum, rel=LOSS_TOLERANCE)
        for name, ours in result.gradients.items():
            seen[name] = max(seen.get(name, 0.0), _gradient_error(name, ours, expected.gradients[name], vocabulary))
        micro_batches = range(result.data_rank, len(expected.micro_batches), data_size)
        assert len(result.logits) in (0, len(micro_batches)), "logits of some micro-batches are missing"
        for index, ours in zip(micro_batches, result.logits, strict=False):
            errors = logits_errors(expected.micro_batches[index], ours, expected.logits[index], vocabulary)
            for document, error in enumerate(errors):
                assert error <= LOGITS_TOLERANCE, f"logits of document {document} of micro-batch {index}: {error}"
            worst_logits = max(worst_logits, *errors)
    patterns = [pattern for entry in frozen for pattern in (entry, f"{entry}.*")]
    trained = {name for name in expected.gradients if not any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert set(seen) <= trained
    # A model may hold what no loss depends on, such as the last layer of a tower that is read before it.
    missing = {name for name in trained - set(seen) if expected.gradients[name].any()}
    assert not missing, f"no rank holds {missing}"
    assert any(result.logits for result in ranks)
    return worst_logits, max(seen.values())


def _gradient_error(name: str, ours: torch.Tensor, theirs: torch.Tensor, vocabulary: int) -> float:
    if name.endswith(VOCABULARY_WEIGHTS):
        assert not ours[vocabulary:].any(), f"gradient in the padding of {name}"
        ours = ours[:vocabulary]
    if not theirs.any() or name.endswith(ZERO_GRADIENT):
        assert ours.abs().max() <= 1e-6, name
        return 0.0
    # Some of ours have one more dimension than transformers', over the same numbers.
    error = relative_error(ours.reshape(theirs.shape), theirs)
    assert error <= GRADIENT_TOLERANCE, f"{name}: {error}"
    return error


def record(name: str, logits: float, gradient: float) -> None:
    """Print, and append to the file that PARITY_REPORT names."""
    print(f"\n{name}: worst logits {logits:.1e}, worst gradient {gradient:.1e}")
    if report := os.environ.get("PARITY_REPORT"):
        with Path(report).open("a") as file:
            file.write(json.dumps({"layout": name, "logits": logits, "gradient": gradient}) + "\n")
