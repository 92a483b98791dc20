"""With Transformer Engine, the layers that can take it do, and every family still equals transformers.

The library is a stand-in (`tests/stand_ins/transformer_engine.py`), and the host computes as a GPU would.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import vlm_kernels.span_attention as span_module
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families import registry
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import check_case
from tests.parity.layouts import RankResult, TestLayout, run_case
from tests.ranks import run_ranks
from tests.sizes import two_sizes
from tests.stand_ins import transformer_engine as stand_in
from vlm_kernels import packed_attention
from vlm_kernels.span_attention import flex, reference
from vlm_kernels.span_attention.transformer_engine import has_head_size

CASES = ("mixed", "packed")
BY_NAME = {family.name: family for family in FAMILIES}


def run(
    hf_dir: str, layout: TestLayout, cases: dict[str, list[MicroBatch]]
) -> tuple[dict[str, RankResult], list[tuple[str, int | None]], int]:
    """What a rank computed, mask and keys in the window of each call of Transformer Engine, and other calls."""
    others: list[Any] = []

    def attend(*inputs: Any) -> torch.Tensor:
        others.append(inputs[4])
        return reference(*inputs)

    with (
        stand_in.installed() as log,
        mock.patch.object(span_module, "is_on_gpu", lambda q: True),
        mock.patch.object(packed_attention, "is_on_gpu", lambda q: True),
        mock.patch.object(flex, "attend", attend),
    ):
        results = run_case(hf_dir, layout, cases)
    calls = [(call["mask"], call["window"][0] + 1 or None) for call in log.calls]
    return results, calls, len(others)


@pytest.mark.parametrize("name", two_sizes(BY_NAME, "gemma3", "gemma4", "qwen3_vl"))
def test_families_equal_transformers(name: str, tmp_path: Path) -> None:
    family: TinyFamily = BY_NAME[name]
    cases = {case: family.expected(case) for case in CASES if case in family.cases}
    batches = {case: each.micro_batches for case, each in cases.items()}
    layout = TestLayout(attention_backend="transformer_engine")
    ((results, calls, others),) = run_ranks(1, run, family.write(tmp_path), layout, batches)
    for case, expected in cases.items():
        check_case([results[case]], expected, family.vocabulary)

    registered = registry.detect(family.config)
    image_mask = "transformers" if registered.chooses_image_mask(family.config) else None
    config = registered.config_from_hf(family.config, False, image_mask)
    decoder: Counter[Any] = Counter()
    for batch in (batch for each in batches.values() for batch in each):
        for layer in config.text.layers:
            taken = has_head_size(layer.head_dim) and (layer.image_mask == "causal" or not batch.sees_ahead)
            decoder["padding_causal" if taken else "other", layer.window if taken else None] += 1
    other_layers = decoder.pop(("other", None), 0)
    assert Counter(call for call in calls if call[0] == "padding_causal") == decoder and decoder
    frames = [call for call in calls if call[0] == "padding"]
    assert all(window is None for _, window in frames)
    assert others >= other_layers and (others == other_layers or not frames)
