"""The packed case of a family shows mistakes of packing; tests/parity/test_families.py shows that there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_vlm.data.collate import NO_LOSS, MicroBatch, spans
from megatron_vlm.training.step import run_global_batch
from tests.families import FAMILIES
from tests.families.gemma3 import GEMMA3, IMAGE
from tests.families.mistral3 import MISTRAL3
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import CLEARLY_WRONG, LOSS_TOLERANCE, worst_logits
from tests.parity.layouts import TestLayout, own_micro_batches, run_case, set_up
from tests.parity.tiny_batches import by_document
from tests.ranks import run_ranks


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_entry_has_a_packed_case(family: TinyFamily) -> None:
    """It is the last one, which layouts of four ranks run, and every data rank has rows of several documents."""
    assert [*family.cases][-1] == "packed"
    for reference in family.micro_batches("packed"):
        batch = reference.batch
        assert (batch.document_ids.max(dim=1).values > batch.document_ids[:, 0]).any()
        assert len(reference.inputs["input_ids"]) == len(batch.document_sources) > len(batch.input_ids)


def documents_see_each_other(batch: MicroBatch) -> MicroBatch:
    return replace(batch, span_low=torch.where(batch.document_ids >= 0, 0, batch.span_low))


def positions_run_on(batch: MicroBatch) -> MicroBatch:
    """Seen by what depends on a position itself: rotation depends on distances."""
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))


def images_of_neighbouring_documents_touch(batch: MicroBatch) -> MicroBatch:
    in_one_document = torch.where(batch.document_ids >= 0, 0, -1)
    return replace(batch, span_high=spans(in_one_document, batch.input_ids == IMAGE)[1])


def features_of_another_document(batch: MicroBatch) -> MicroBatch:
    """Each document's index from zero."""
    index = batch.feature_index.clone()
    for number in range(len(batch.document_sources)):
        own = (batch.document_ids == number) & (index >= 0)
        index[own] -= index[own][:1]
    return replace(batch, feature_index=index)


Mistake = Callable[[MicroBatch], MicroBatch]
MISTAKES: list[tuple[TinyFamily, Mistake]] = [
    *product((GEMMA3, QWEN3_VL, MISTRAL3), (documents_see_each_other, features_of_another_document)),
    (MISTRAL3, positions_run_on),
    (GEMMA3, images_of_neighbouring_documents_touch),
]


@pytest.mark.parametrize(
    ("family", "mistake"), MISTAKES, ids=[f"{family}, {mistake.__name__}" for family, mistake in MISTAKES]
)
def test_packing_wrongly_shows(family: TinyFamily, mistake: Mistake, tmp_path: Path) -> None:
    right = family.expected("packed")
    wrong = [mistake(batch) for batch in right.micro_batches]
    (found,) = run_ranks(1, run_case, family.write(tmp_path), TestLayout(), {"wrong": wrong})
    error = worst_logits(found["wrong"].logits, right, family.vocabulary)
    print(f"\n{family}, {mistake.__name__}: {error:.1e}")
    assert error >= CLEARLY_WRONG


def losses_by_source(hf_dir: str, batches: list[MicroBatch]) -> list[list[float]]:
    """[(loss sum, label tokens)] of two sources."""
    layout = TestLayout(2, pipeline=2)
    model, groups = set_up(hf_dir, layout)
    return run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups, num_sources=2).tolist()


def test_losses_count_for_the_source_of_their_document(tmp_path: Path) -> None:
    """Documents of one row come from different sources."""
    right = GEMMA3.expected("packed")
    batches, sums = [], torch.zeros(2, 2, dtype=torch.float64)
    for batch, logits in zip(right.micro_batches, right.logits, strict=True):
        sources = torch.arange(len(logits), dtype=torch.int32) % 2
        batches.append(replace(batch, document_sources=sources))
        for source, scores, labels in zip(sources, logits, by_document(batch, batch.labels, NO_LOSS), strict=True):
            loss = cross_entropy(scores, labels, ignore_index=NO_LOSS, reduction="sum")
            sums[source] += torch.tensor([loss, (labels != NO_LOSS).sum()])
    assert (sums[:, 1] > 0).all()
    for found in run_ranks(2, losses_by_source, GEMMA3.write(tmp_path), batches):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), sums, rtol=LOSS_TOLERANCE, atol=0)
