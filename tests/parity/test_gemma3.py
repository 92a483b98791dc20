"""What only Gemma 3 has, and how the loss is computed, which is the same for all families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.parallel.chunk_settings import LossSettings
from tests.families import gemma3
from tests.families.gemma3 import GEMMA3, ROWS, make_batch
from tests.families.layouts import CONTEXT
from tests.parity.comparison import LOSS_TOLERANCE, check_layout
from tests.parity.layouts import LAYOUTS, TestLayout, own_micro_batches, run_case, set_up
from tests.ranks import run_ranks


def test_capped_logits_with_padded_vocabulary(tmp_path: Path) -> None:
    """The cap must not lift the padding's logits back into the softmax; a small cap shows it."""
    model = gemma3.build(with_vision=False, final_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    batch = make_batch(ROWS["text"])
    _, loss = gemma3.reference(model, batch)
    ranks = run_ranks(2, run_case, str(tmp_path), LAYOUTS["TP2"], {"text": [batch]})
    for result in (rank["text"] for rank in ranks):
        assert result.loss_sum / result.label_tokens == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["TP2xPP2+SP", "DP2, overlapped"])
def test_loss_in_many_chunks(name: str, tmp_path: Path) -> None:
    """Of three tokens each: the tied weight's gradient comes from every chunk and from the lookup."""
    layout = LAYOUTS[name]
    chunked = replace(layout, loss=LossSettings(chunk_bytes=3 * 4 * 256 // layout.tensor))
    check_layout(chunked, GEMMA3.write(tmp_path), {"mixed": GEMMA3.expected("mixed")}, GEMMA3.vocabulary)


@pytest.mark.parametrize("name", ["TP2+SP", "PP2xVPP2", "TP2xPP2+SP, full recompute", "DP2, overlapped", "CP2xTP2+SP"])
def test_every_second_layer_frozen(name: str, tmp_path: Path) -> None:
    """By patterns: gradients pass through what does not train."""
    frozen = ("language_model.layers.*[13].*", "vision_tower.encoder.layers.1.*", "*norm.weight")
    layout = replace((LAYOUTS | CONTEXT)[name], freeze=frozen)
    check_layout(layout, GEMMA3.write(tmp_path), {"mixed": GEMMA3.expected("mixed")}, GEMMA3.vocabulary)


Z_LOSS = 0.1


def losses(hf_directory: str, layout: TestLayout, batch: MicroBatch) -> list[torch.Tensor]:
    """[B, S] while training and while evaluating."""
    (chunk,), groups = set_up(hf_directory, layout)
    (batch,) = own_micro_batches([chunk], [batch], groups, layout)
    return [unwrap_model(chunk).train(training)(batch).detach().cpu() for training in (True, False)]


def test_z_loss_while_training(tmp_path: Path) -> None:
    model = gemma3.build(with_vision=False)
    model.save_pretrained(tmp_path)
    batch = make_batch(ROWS["text"])
    logits, mean = gemma3.reference(model, batch)
    z_losses = Z_LOSS * torch.where(batch.labels == -100, 0.0, logits.logsumexp(-1).square())
    layout = replace(LAYOUTS["TP2"], loss=LossSettings(z_loss_coeff=Z_LOSS))
    for training, evaluating in run_ranks(2, losses, str(tmp_path), layout, batch):
        assert evaluating.sum() / (batch.labels != -100).sum() == pytest.approx(mean.item(), rel=LOSS_TOLERANCE)
        torch.testing.assert_close(training - evaluating, z_losses.detach(), rtol=1e-5, atol=1e-5)
