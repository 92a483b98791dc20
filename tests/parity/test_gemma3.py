"""Gemma 3 equals transformers in logits, loss and the gradient of every parameter, in every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity import gemma3_tiny
from tests.parity.battery import LOSS_TOLERANCE, Expected, check_layout, record
from tests.parity.gemma3_tiny import ROWS, VOCABULARY, make_batch, split_rows
from tests.parity.layouts import LAYOUTS, hf_gradients, run_case
from tests.ranks import run_ranks


@cache
def expected(with_vision: bool, tied: bool, case: str) -> Expected:
    """Micro-batches of one row, and what transformers computes on all rows at once."""
    model = gemma3_tiny.build(with_vision, tied).train()
    whole = make_batch(ROWS[case])
    logits, loss = gemma3_tiny.reference(model, whole)
    loss.backward()
    label_tokens = int((whole.labels != -100).sum())
    gradients = {
        name: torch.zeros(1) if gradient is None else gradient for name, gradient in hf_gradients(model).items()
    }
    # Padding sees only itself here; transformers' padding sees the row.
    lengths = [[count] for count, _ in ROWS[case]]
    return Expected(
        split_rows(whole), gradients, list(logits.detach()[:, None]), lengths, loss.item() * label_tokens, label_tokens
    )


@pytest.fixture(scope="session")
def hf_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], str]:
    directories = {}
    for with_vision in (False, True):
        for tied in (False, True):
            path = tmp_path_factory.mktemp("hf")
            gemma3_tiny.build(with_vision, tied).save_pretrained(path)
            directories[with_vision, tied] = str(path)
    return directories


def check(name: str, directory: str, with_vision: bool, tied: bool, cases: list[str]) -> tuple[float, float]:
    """Worst errors of logits and gradients in the layout of that name."""
    computed = {case: expected(with_vision, tied, case) for case in cases}
    return check_layout(LAYOUTS[name], directory, computed, VOCABULARY)


@pytest.mark.parametrize("name", LAYOUTS)
def test_vision_language_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    record(f"Gemma 3, {name}", *check(name, hf_directories[True, True], True, True, list(ROWS)))


@pytest.mark.parametrize("name", ["TP1", "TP2+SP", "TP4", "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer"])
def test_text_only_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    record(f"Gemma 3 text only, {name}", *check(name, hf_directories[False, True], False, True, ["text"]))


@pytest.mark.parametrize("name", ["TP1", "TP2xPP2+SP"])
def test_untied_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    record(f"Gemma 3 untied, {name}", *check(name, hf_directories[True, False], True, False, ["mixed"]))


def test_capped_logits_with_padded_vocabulary(tmp_path: Path) -> None:
    """The cap must not lift the padding's logits back into the softmax; a small cap shows it."""
    model = gemma3_tiny.build(with_vision=False, final_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    batch = make_batch(ROWS["text"])
    _, loss = gemma3_tiny.reference(model, batch)
    ranks = run_ranks(2, run_case, str(tmp_path), LAYOUTS["TP2"], {"text": [batch]})
    for result in (rank["text"] for rank in ranks):
        assert result.loss_sum / result.label_tokens == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
