"""The counts of `benchmarks/packing.py` on a tiny model, against what can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.packing_counts import Case, Model, count, make_samples
from megatron_vlm import platform
from tests.training.test_memory import family_of, model_config_of, run_config

LENGTHS = (100, 60, 40, 20)
PAIRS = sum(length * (length + 1) // 2 for length in LENGTHS)


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    """Four samples in rows of their own, in two of each, and packed into rows of 120 tokens."""
    platform.initialize("cpu")
    name = "qwen3_vl"
    model = Model(run_config(), family_of(name), model_config_of(name), num_gpus=1)
    cases = {
        "unpacked": Case("unpacked"),
        "padded": Case("padded", micro_batch_size=2),
        "packed": Case("packed", 120),
        "context": Case("context", 120, context_size=2),
    }
    samples = make_samples(model, LENGTHS)
    return {name: count(model, case, samples) for name, case in cases.items()}


def test_samples_are_the_same(figures: dict[str, dict[str, Any]]) -> None:
    for row in figures.values():
        # Each sample's first token is no target.
        assert (row["samples"], row["tokens"], row["label_tokens"]) == (4, 220, 220 - 4)
        assert row["pairs"] == {"all": PAIRS}
        assert row["model_flops"] == figures["unpacked"]["model_flops"]


def test_positions(figures: dict[str, dict[str, Any]]) -> None:
    """Rows of 100, 60, 40 and 20; of 100 and 100, 40 and 40; of 100 + 20 and 60 + 40."""
    found = {name: (row["rows"], row["micro_batches_per_data_rank"], row["positions"]) for name, row in figures.items()}
    assert found["unpacked"] == (4, 4, 220)
    assert found["padded"] == (4, 2, 280)
    assert found["packed"] == (2, 2, 220)
    assert figures["unpacked"]["padding_share"] == figures["packed"]["padding_share"] == 0
    assert figures["padded"]["padding_share"] == pytest.approx(60 / 280)


def test_launches_are_those_of_micro_batches(figures: dict[str, dict[str, Any]]) -> None:
    """Four of one row against two of one row, whatever is in the row."""
    assert figures["unpacked"]["launches_per_rank"] == 2 * figures["packed"]["launches_per_rank"]


def test_context_ranks(figures: dict[str, dict[str, Any]]) -> None:
    assert figures["context"]["gpus"] == 2
    assert set(figures["context"]["sent_bytes_per_rank"]) == {"context"}
    assert figures["context"]["peak_activation_bytes"] < figures["packed"]["peak_activation_bytes"]
