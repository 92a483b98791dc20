"""Qwen3-VL, dense and with experts, equals transformers in logits, loss and every gradient, in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers import PreTrainedModel

from megatron_vlm.parallel.chunk import MoESettings
from tests.parity import qwen3_vl_tiny
from tests.parity.battery import Expected, check_layout, record
from tests.parity.layouts import LAYOUTS, TestLayout, hf_gradients
from tests.parity.qwen3_vl_tiny import CASES, MOE, TOP_K, VOCABULARY, Reference, make_batch

Balancing = Literal["none", "transformers", "megatron"]

# DeepStack levels enter after decoder layers 0, 1 and 2: these splits make none, some or all of them cross stages.
DEEPSTACK_LAYOUTS = {
    "PP2, DeepStack crossing": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
    "PP2xVPP2, DeepStack crossing": TestLayout(2, pipeline=2, virtual=2, pipeline_layout=(0, 1, 1, 2)),
    "TP2xPP2+SP, vision alone": TestLayout(
        4, tensor=2, pipeline=2, sequence_parallel=True, pipeline_layout=(0, 4), vision="data"
    ),
    "DP2xPP2, overlapped, DeepStack crossing": TestLayout(
        4, pipeline=2, pipeline_layout=(1, 3), distributed_optimizer=True, overlap=True
    ),
    "DP2, overlapped, full recompute": TestLayout(2, distributed_optimizer=True, overlap=True, recompute="full"),
}
DENSE_LAYOUTS = LAYOUTS | DEEPSTACK_LAYOUTS

ALLGATHER = MoESettings(token_dispatcher_type="allgather")
MOE_LAYOUTS = {
    "TP1": TestLayout(),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True),
    "TP4+SP": TestLayout(4, tensor=4, sequence_parallel=True),
    "PP2": TestLayout(2, pipeline=2),
    "PP2 uneven": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
    "PP4": TestLayout(4, pipeline=4),
    "PP4, stages without layers between": TestLayout(4, pipeline=4, pipeline_layout=(2, 0, 0, 2)),
    "PP2xVPP2": TestLayout(2, pipeline=2, virtual=2),
    "TP2xPP2+SP": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True),
    "DP2, distributed optimizer": TestLayout(2, distributed_optimizer=True),
    "EP2": TestLayout(2, expert=2),
    "EP2, distributed optimizer, overlapped": TestLayout(2, expert=2, distributed_optimizer=True, overlap=True),
    "EP2, all-gather": TestLayout(2, expert=2, moe=ALLGATHER),
    "EP2, full recompute": TestLayout(2, expert=2, recompute="full"),
    "EP4": TestLayout(4, expert=4),
    "EP2xDP2, distributed optimizer": TestLayout(4, expert=2, distributed_optimizer=True),
    "EP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2),
    "EP2xTP2+SP, all-gather": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, moe=ALLGATHER),
    "EP4xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=4),
    "EP2xPP2": TestLayout(4, pipeline=2, expert=2),
    "ETP2, TP1": TestLayout(2, expert_tensor=2),
    "ETP2xTP2+SP": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "ETP2xEP2xTP2+SP": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    "ETP2xEP2xTP2+SP, all-gather": TestLayout(
        4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2, moe=ALLGATHER
    ),
    "TP2+SP, vision DP": TestLayout(2, tensor=2, sequence_parallel=True, vision="data"),
}
BALANCING_LAYOUTS = ("TP1", "TP2+SP", "PP2", "PP2xVPP2", "TP2xPP2+SP", "EP2xTP2+SP", "EP2xPP2")


@cache
def model(moe: bool, tied: bool) -> PreTrainedModel:
    return qwen3_vl_tiny.build(moe, tied).train()


@cache
def expected(moe: bool, tied: bool, case: str, balancing: Balancing = "none") -> Expected:
    """What transformers computes, micro-batch by micro-batch."""
    reference, micro_batches = (
        model(moe, tied),
        [make_batch(rows, seed=seed, moe=moe) for seed, rows in enumerate(CASES[case])],
    )
    reference.zero_grad()
    label_tokens = int(sum((each.batch.labels != -100).sum() for each in micro_batches))
    logits, loss_sum = [], 0.0
    for each in micro_batches:
        computed, loss = qwen3_vl_tiny.reference(reference, each)
        loss_sum += loss.item()
        if balancing != "none":
            loss = loss + balancing_loss(reference, each, balancing)
        (loss / label_tokens).backward()
        logits.append(computed.detach())
    gradients = {
        name: torch.zeros(1) if gradient is None else gradient.clone()
        for name, gradient in hf_gradients(reference).items()
    }
    batches = [each.batch for each in micro_batches]
    return Expected(batches, gradients, logits, [each.lengths for each in micro_batches], loss_sum, label_tokens)


def balancing_loss(reference: PreTrainedModel, each: Reference, definition: Balancing) -> torch.Tensor:
    """The load-balancing loss of a micro-batch times its coefficient and label tokens, by those who defined it."""
    output = reference(**each.inputs, output_router_logits=True)
    loss = output.aux_loss
    if definition == "megatron":
        is_real = each.inputs["attention_mask"].flatten().bool()
        loss = torch.zeros(())
        for logits in output.router_logits:
            logits = logits[is_real]
            chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K).indices, 1.0)
            loss = loss + switch_load_balancing_loss_func(
                logits.softmax(-1), chosen.sum(0), int(is_real.sum()), TOP_K, logits.shape[1], moe_aux_loss_coeff=1.0
            )
    return MOE["router_aux_loss_coef"] * loss * (each.batch.labels != -100).sum()


@pytest.fixture(scope="session")
def hf_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], str]:
    """By (experts, tied)."""
    directories = {}
    for moe, tied in ((False, False), (False, True), (True, False)):
        path = tmp_path_factory.mktemp("hf")
        model(moe, tied).save_pretrained(path)
        directories[moe, tied] = str(path)
    return directories


@pytest.mark.parametrize("name", DENSE_LAYOUTS)
def test_dense_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    cases = {case: expected(False, False, case) for case in CASES}
    record(f"Qwen3-VL, {name}", *check_layout(DENSE_LAYOUTS[name], hf_directories[False, False], cases, VOCABULARY))


@pytest.mark.parametrize("name", ["TP1", "TP2xPP2+SP"])
def test_tied_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    cases = {"mixed": expected(False, True, "mixed")}
    record(f"Qwen3-VL tied, {name}", *check_layout(LAYOUTS[name], hf_directories[False, True], cases, VOCABULARY))


@pytest.mark.parametrize("name", MOE_LAYOUTS)
def test_expert_parity(name: str, hf_directories: dict[tuple[bool, bool], str]) -> None:
    cases = {case: expected(True, False, case) for case in ("two images", "image and video", "mixed")}
    record(f"Qwen3-VL-MoE, {name}", *check_layout(MOE_LAYOUTS[name], hf_directories[True, False], cases, VOCABULARY))


@pytest.mark.parametrize("name", ["EP2", "EP2, all-gather", "EP2xPP2", "ETP2, TP1"])
@pytest.mark.parametrize("frozen", [("language_model",), ("language_model", "vision_tower")])
def test_frozen_parts_with_experts(
    name: str, frozen: tuple[str, ...], hf_directories: dict[tuple[bool, bool], str]
) -> None:
    """A data rank's micro-batch without images trains nothing, and yet its experts take part in the backward pass."""
    layout = replace(MOE_LAYOUTS[name], freeze=frozen)
    check_layout(layout, hf_directories[True, False], {"mixed": expected(True, False, "mixed")}, VOCABULARY)


@pytest.mark.parametrize("definition", ["transformers", "megatron"])
@pytest.mark.parametrize("name", BALANCING_LAYOUTS)
def test_load_balancing_parity(name: str, definition: Balancing, hf_directories: dict[tuple[bool, bool], str]) -> None:
    moe = MoESettings(load_balancing=definition, aux_loss_coeff=MOE["router_aux_loss_coef"])
    layout = replace(MOE_LAYOUTS[name], moe=moe)
    cases = {"mixed": expected(True, False, "mixed", definition)}
    record(
        f"Qwen3-VL-MoE, {name}, balanced ({definition})",
        *check_layout(layout, hf_directories[True, False], cases, VOCABULARY),
    )
