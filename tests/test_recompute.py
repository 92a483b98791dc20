"""Recomputation keeps no state of random generators, because no model draws from them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.step import run_global_batch
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import TestLayout, own_micro_batches, set_up
from tests.ranks import run_ranks
from tests.sizes import full


def states_read(directory: str, batches: list[MicroBatch]) -> tuple[int, bool]:
    """How often the state of the generator was read in a step with recomputation, and whether it has changed."""
    reads, changed = 0, False
    for recompute in ("selective", "full"):
        layout = TestLayout(recompute=recompute)
        model, groups = set_up(directory, layout)
        for chunk in model:
            chunk.train()
        before = torch.get_rng_state()
        with patch("torch.get_rng_state", wraps=torch.get_rng_state) as spy:
            run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)
        reads += spy.call_count
        changed |= not torch.equal(before, torch.get_rng_state())
    return reads, changed


IN_SMALL_SUITE = ("gemma3", "gemma4 26B-A4B", "qwen3_vl", "mistral3")


@pytest.mark.parametrize(
    "family",
    [
        family if family.name in IN_SMALL_SUITE else full(family, id=family.name)
        for family in FAMILIES
        if family.tables.norm
    ],
    ids=str,
)
def test_nothing_is_random(family: TinyFamily, tmp_path: Path) -> None:
    batches = [reference.batch for reference in family.micro_batches("mixed")[:1]]
    assert run_ranks(1, states_read, family.write(tmp_path), batches) == [(0, False)]
