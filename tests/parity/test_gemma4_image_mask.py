"""What 12B trains with by default, `model.image_mask: window`, equals transformers with the masks of its generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm.families.registry import Family
from tests.families.gemma4 import TEXT, UNIFIED
from tests.parity.comparison import Expected, check_case, expected
from tests.parity.layouts import LAYOUTS, RankResult, TestLayout, run_case
from tests.ranks import run_ranks

CASES = ("two images", "image and video", "packed")


def with_masks_of_generation(case: str) -> Expected:
    model, batches = UNIFIED.model(), UNIFIED.micro_batches(case)
    for batch in batches:
        ids, inputs = batch.inputs["input_ids"], batch.inputs
        inputs["attention_mask"] = type(model).create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.zeros(*ids.shape, TEXT["hidden_size"]),
            attention_mask=inputs["attention_mask"],
            past_key_values=None,
            position_ids=None,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            is_first_iteration=True,
        )
    return expected(model, batches)


def run_by_default(directory: str, layout: TestLayout, cases: dict[str, Sequence[Any]]) -> dict[str, RankResult]:
    with mock.patch.object(Family, "chooses_image_mask", return_value=False):
        return run_case(directory, layout, {case: list(batches) for case, batches in cases.items()})


@pytest.mark.parametrize("name", ["TP1", "TP2+SP", "PP2"])
def test_windows_hide_what_generation_hides(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = UNIFIED.write(tmp_path_factory.mktemp("hf"))
    theirs = {case: with_masks_of_generation(case) for case in CASES}
    batches = {case: each.micro_batches for case, each in theirs.items()}
    layout = LAYOUTS[name]
    ranks = run_ranks(layout.world_size, run_by_default, directory, layout, batches)
    for case in CASES:
        check_case([rank[case] for rank in ranks], theirs[case], UNIFIED.vocabulary)
