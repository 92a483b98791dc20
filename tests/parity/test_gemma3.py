"""Gemma 3 equals transformers in logits, loss and the gradient of every parameter, in every layout."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_vlm.data.collate import MicroBatch
from tests.parity import gemma3_tiny
from tests.parity.gemma3_tiny import ROWS, VOCABULARY, make_batch
from tests.parity.layouts import LAYOUTS, RankResult, TestLayout, hf_gradients, run_case
from tests.ranks import run_ranks

# fp32 sums in another order: one product of 32 to 250 terms differs by about 1e-7 relative, a network of 4 layers
# amplifies that to 1e-6 .. 1e-5. The largest error seen over all layouts is printed by `pytest -s`.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6

# Softmax does not change when one number is added to all scores of a query: a key bias has no gradient.
ZERO_GRADIENT = "k_proj.bias"


@cache
def reference_case(with_vision: bool, tied: bool, case: str) -> tuple[list[MicroBatch], dict, list, float, float]:
    """Micro-batches of one row, and transformers' gradients, logits, loss sum and label tokens on all rows at once."""
    model = gemma3_tiny.build(with_vision, tied).train()
    rows = ROWS[case]
    whole = make_batch(rows)
    logits, loss = gemma3_tiny.reference(model, whole)
    loss.backward()
    label_tokens = (whole.labels != -100).sum().item()
    gradients = {
        name: torch.zeros(1) if gradient is None else gradient for name, gradient in hf_gradients(model).items()
    }
    return split_rows(whole), gradients, list(logits.detach()), loss.item() * label_tokens, label_tokens


def split_rows(whole: MicroBatch) -> list[MicroBatch]:
    """One micro-batch per row, with its own images."""
    micro_batches = []
    for row in range(whole.input_ids.shape[0]):
        index = whole.feature_index[row : row + 1]
        images = torch.unique(index[index >= 0] // gemma3_tiny.TOKENS_PER_IMAGE).long()
        fields = {name: value[row : row + 1] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
        if len(images):
            offset = int(images[0]) * gemma3_tiny.TOKENS_PER_IMAGE
            fields["feature_index"] = torch.where(index >= 0, index - offset, -1)
        pixels = {"pixel_values": whole.vision_inputs["pixel_values"][images]} if len(images) else {}
        micro_batches.append(MicroBatch(**fields, vision_inputs=pixels))
    return micro_batches


@pytest.fixture(scope="session")
def hf_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], str]:
    directories = {}
    for with_vision in (False, True):
        for tied in (False, True):
            path = tmp_path_factory.mktemp("hf")
            gemma3_tiny.build(with_vision, tied).save_pretrained(path)
            directories[with_vision, tied] = str(path)
    return directories


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value of the tensor."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def check(ranks: list[dict[str, RankResult]], case: str, with_vision: bool, tied: bool) -> tuple[float, float]:
    micro_batches, gradients, logits, loss_sum, label_tokens = reference_case(with_vision, tied, case)
    seen: set[str] = set()
    worst_gradient = worst_logits = 0.0
    data_size = 1 + max(result[case].data_rank for result in ranks)
    for result in (rank[case] for rank in ranks):
        assert result.label_tokens == label_tokens
        assert result.loss_sum == pytest.approx(loss_sum, rel=LOSS_TOLERANCE)
        for name, ours in result.gradients.items():
            theirs = gradients[name]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert not ours[VOCABULARY:].any(), f"gradient in the padding of {name}"
                ours = ours[:VOCABULARY]
            seen.add(name)
            if not theirs.any() or name.endswith(ZERO_GRADIENT):
                assert ours.abs().max() <= 1e-6, name
                continue
            error = relative_error(ours, theirs)
            assert error <= GRADIENT_TOLERANCE, f"{name}: {error}"
            worst_gradient = max(worst_gradient, error)
        rows = range(result.data_rank, len(micro_batches), data_size)
        for row, ours in zip(rows, result.logits, strict=False):
            count = ROWS[case][row][0]  # padding sees only itself here; transformers' padding sees the row
            error = relative_error(ours[0, :count, :VOCABULARY], logits[row][:count])
            assert error <= LOGITS_TOLERANCE, f"logits of row {row}: {error}"
            worst_logits = max(worst_logits, error)
    assert seen == set(gradients), f"no rank holds {set(gradients) - seen}"
    assert any(result[case].logits for result in ranks)
    return worst_logits, worst_gradient


def run_layout(
    layout: TestLayout, directory: str, with_vision: bool, tied: bool, cases: list[str]
) -> tuple[float, float]:
    batches = {case: reference_case(with_vision, tied, case)[0] for case in cases}
    ranks = run_ranks(layout.world_size, run_case, directory, layout, batches)
    worst = [check(ranks, case, with_vision, tied) for case in cases]
    return max(logits for logits, _ in worst), max(gradient for _, gradient in worst)


@pytest.mark.parametrize("name", LAYOUTS)
def test_vision_language_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    logits, gradient = run_layout(LAYOUTS[name], hf_directories[True, True], True, True, list(ROWS))
    _record(f"{name}", logits, gradient)


@pytest.mark.parametrize("name", ["TP1", "TP2+SP", "TP4", "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer"])
def test_text_only_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    logits, gradient = run_layout(LAYOUTS[name], hf_directories[False, True], False, True, ["text"])
    _record(f"{name}, text only", logits, gradient)


@pytest.mark.parametrize("name", ["TP1", "TP2xPP2+SP"])
def test_untied_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    logits, gradient = run_layout(LAYOUTS[name], hf_directories[True, False], True, False, ["mixed"])
    _record(f"{name}, untied", logits, gradient)


def test_capped_logits_with_padded_vocabulary(tmp_path: Path) -> None:
    """The cap must not lift the padding's logits back into the softmax; a small cap shows it."""
    model = gemma3_tiny.build(with_vision=False, final_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    batch = make_batch(ROWS["text"])
    _, loss = gemma3_tiny.reference(model, batch)
    ranks = run_ranks(2, run_case, str(tmp_path), LAYOUTS["TP2"], {"text": [batch]})
    for result in (rank["text"] for rank in ranks):
        assert result.loss_sum / result.label_tokens == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)


def _record(name: str, logits: float, gradient: float) -> None:
    """Print, and append to the file that PARITY_REPORT names."""
    print(f"\n{name}: worst logits {logits:.1e}, worst gradient {gradient:.1e}")
    if report := os.environ.get("PARITY_REPORT"):
        with Path(report).open("a") as file:
            file.write(json.dumps({"layout": name, "logits": logits, "gradient": gradient}) + "\n")
