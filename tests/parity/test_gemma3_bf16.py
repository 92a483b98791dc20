"""In bf16 we are as close to transformers in fp32 as transformers in bf16 is, in loss and gradients."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.step import run_global_batch
from tests.families import gemma3
from tests.families.gemma3 import ROWS, collate_drawn, draw, make_batch
from tests.parity.comparison import ZERO_GRADIENT
from tests.parity.layouts import LAYOUTS, TestLayout, hf_gradients, own_micro_batches, set_up, whole_gradients
from tests.ranks import run_ranks
from tests.sizes import full

# bf16 keeps 8 bits: rounding every activation costs transformers 2 % of each gradient here. We round at the same places
# but for sums over tensor ranks, which round once per rank more. Seen: at most 1.05 times as much over all gradients
# together (norms computed in bf16: 1.36, rotary angles in bf16: 6.8), and 3.1 times in the worst single one, a bias of
# the tower, where both are few roundings of few numbers.
OVERALL_RATIO = 1.25
SINGLE_RATIO = 5.0
# Seen: transformers in bf16 is off by 1e-4 of the loss, we by at most 3e-4 in any layout.
LOSS_TOLERANCE = 1e-3

Figures = tuple[float, dict[str, torch.Tensor]]


@cache
def model_of_bf16_values() -> PreTrainedModel:
    """fp32, but every weight exact in bf16: what differs is the arithmetic alone."""
    model = gemma3.build(with_vision=True).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@cache
def micro_batches() -> list[MicroBatch]:
    """Short rows with and without images, and a long one: positions past 256 are not exact in bf16."""
    short = [collate_drawn([document]) for document in draw(ROWS["mixed"])]
    return [*short, make_batch([(400, [])], seed=3, pad_to_multiple_of=4)]


@cache
def reference(dtype: torch.dtype) -> Figures:
    """Mean loss and gradients of transformers, row after row, added in fp32."""
    model = copy.deepcopy(model_of_bf16_values()).to(dtype)
    label_tokens = sum(int((batch.labels != -100).sum()) for batch in micro_batches())
    mean, gradients = 0.0, {name: torch.zeros(p.shape) for name, p in _named(model)}
    for batch in micro_batches():
        model.zero_grad()
        loss = gemma3.reference(model, batch)[1] * (batch.labels != -100).sum()
        loss.backward()
        mean += loss.item() / label_tokens
        for name, gradient in hf_gradients(model).items():
            if gradient is not None:
                gradients[name] += gradient.float() / label_tokens
    return mean, gradients


def _named(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return list(zip(hf_gradients(model), model.parameters(), strict=True))


def run(directory: str, layout: TestLayout, batches: list[MicroBatch]) -> Figures:
    model, groups = set_up(directory, layout, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for chunk in model for parameter in chunk.parameters())
    loss_sum, label_tokens = run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)[
        0
    ].tolist()
    gradients = whole_gradients(model, groups)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return loss_sum / label_tokens, gradients


def distances(gradients: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
    """From transformers in fp32: of all gradients together, and of each relative to its norm."""
    exact = reference(torch.float32)[1]
    compared = {name: exact[name] for name in gradients if not name.endswith(ZERO_GRADIENT)}
    errors = {name: (gradients[name][: len(theirs)] - theirs).norm().item() for name, theirs in compared.items()}
    together = torch.tensor(list(errors.values())).norm().item()
    return together, {name: errors[name] / theirs.norm().item() for name, theirs in compared.items()}


@pytest.mark.parametrize("name", ["TP1", "TP2+SP", full("TP4"), "PP2", full("TP2, vision DP"), "DP2, overlapped"])
def test_as_close_as_transformers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("hf")
    model_of_bf16_values().save_pretrained(directory)
    results = run_ranks(LAYOUTS[name].world_size, run, str(directory), LAYOUTS[name], micro_batches())
    ours = {key: gradient for _, gradients in results for key, gradient in gradients.items()}
    exact_loss, exact = reference(torch.float32)
    assert set(ours) == set(exact)
    assert all(loss == pytest.approx(exact_loss, rel=LOSS_TOLERANCE) for loss, _ in results)
    together, single = distances(ours)
    their_together, their_single = distances(reference(torch.bfloat16)[1])
    worst = max(single, key=lambda key: single[key] / their_single[key])
    print(f"\n{name}: {together / their_together:.2f} together, {single[worst] / their_single[worst]:.2f} {worst}")
    assert together <= OVERALL_RATIO * their_together
    assert single[worst] <= SINGLE_RATIO * their_single[worst], worst
