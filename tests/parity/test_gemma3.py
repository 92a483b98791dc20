"""What only Gemma 3 has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import gemma3
from tests.families.gemma3 import ROWS, make_batch
from tests.parity.battery import LOSS_TOLERANCE
from tests.parity.layouts import LAYOUTS, run_case
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
