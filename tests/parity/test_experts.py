"""Experts where parts are frozen, and where a load-balancing loss is on, equal transformers in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Literal

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

from megatron_vlm.parallel.chunk_settings import MoESettings
from tests.families.layouts import PARITY_OF_EXPERTS
from tests.families.qwen3_vl import MOE, QWEN3_VL_MOE, TOP_K
from tests.parity.comparison import Expected, check_layout, expected, record
from tests.parity.tiny_batches import Reference
from tests.sizes import two_sizes

Definition = Literal["transformers", "megatron"]
BALANCING_LAYOUTS = two_sizes(
    (
        *("TP1", "TP2+SP", "PP2", "PP2xVPP2", "TP2xPP2+SP", "EP2xTP2+SP", "EP2xPP2"),
        *("CP2, random blocks", "CP2xTP2+SP, EP4", "CP2xPP2xVPP2, full recompute"),
    ),
    *("PP2xVPP2", "EP2xTP2+SP", "EP2xPP2", "CP2xTP2+SP, EP4"),
)


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return QWEN3_VL_MOE.write(tmp_path_factory.mktemp("hf"))


def balancing_loss(definition: Definition, each: Reference) -> torch.Tensor:
    """The load-balancing loss of a micro-batch times its coefficient and label tokens, by those who defined it."""
    output = QWEN3_VL_MOE.model()(**each.inputs, output_router_logits=True)
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


@cache
def balanced(definition: Definition) -> Expected:
    """Transformers with the load-balancing loss."""
    return expected(QWEN3_VL_MOE.model(), QWEN3_VL_MOE.micro_batches("mixed"), partial(balancing_loss, definition))


@pytest.mark.parametrize(
    "name", two_sizes(("EP2", "EP2, all-gather", "EP2xPP2", "ETP2, TP1", "CP2, EP2"), "EP2, all-gather", "EP2xPP2")
)
@pytest.mark.parametrize("frozen", [("language_model",), ("language_model", "vision_tower")])
def test_frozen_parts(name: str, frozen: tuple[str, ...], hf_directory: str) -> None:
    """A data rank's micro-batch without images trains nothing, and yet its experts take part in the backward pass."""
    layout = replace(PARITY_OF_EXPERTS[name], freeze=frozen)
    check_layout(layout, hf_directory, {"mixed": QWEN3_VL_MOE.expected("mixed")}, QWEN3_VL_MOE.vocabulary)


@pytest.mark.parametrize("definition", ["transformers", "megatron"])
@pytest.mark.parametrize("name", BALANCING_LAYOUTS)
def test_load_balancing(name: str, definition: Definition, hf_directory: str) -> None:
    moe = MoESettings(load_balancing=definition, aux_loss_coeff=MOE["router_aux_loss_coef"])
    layout = replace(PARITY_OF_EXPERTS[name], moe=moe)
    worst = check_layout(layout, hf_directory, {"mixed": balanced(definition)}, QWEN3_VL_MOE.vocabulary)
    record(f"qwen3_vl_moe, {name}, balanced ({definition})", *worst)
