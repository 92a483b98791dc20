"""The layouts with context ranks show mistakes; tests/parity/test_families.py shows that there are none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_shard import shard_for_context
from megatron_vlm.layers import context_exchange, load_balancing
from megatron_vlm.parallel.chunk_settings import MoESettings
from tests.families.gemma3 import GEMMA3
from tests.families.qwen3_vl import MOE, QWEN3_VL, QWEN3_VL_MOE
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import CLEARLY_WRONG, Expected, expected, relative_error
from tests.parity.layouts import RankResult, TestLayout, run_case
from tests.parity.test_experts import balancing_loss
from tests.ranks import run_ranks

CP2 = TestLayout(2, context=2, blocks="random")
BALANCED = TestLayout(
    2, context=2, moe=MoESettings(load_balancing="transformers", aux_loss_coeff=MOE["router_aux_loss_coef"])
)


def gradients_of_sent_keys_are_lost() -> Any:
    """Each rank keeps those of its own queries alone."""

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        own = torch.distributed.get_rank()
        total = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])
        return total.index_add_(0, index.split(ctx.counts)[own], gradient.split(ctx.counts)[own]), None, None

    return mock.patch.object(context_exchange._SentRows, "backward", staticmethod(backward))


def features_in_the_order_of_their_encoders() -> Any:
    """Not in that of their tokens."""

    def unordered(features: torch.Tensor, rank_of_feature: np.ndarray, context: Any, group: Any) -> torch.Tensor:
        received = context_exchange.exchange_features(features, rank_of_feature, context, group)
        own = context.image_features[group.rank()]
        return received[np.argsort(rank_of_feature[own], kind="stable")]

    return mock.patch("megatron_vlm.layers.patches.exchange_features", unordered)


def gradients_of_the_balance_are_not_summed() -> Any:
    return mock.patch.object(load_balancing, "copy_to_tensor_model_parallel_region", lambda x, group: x)


def positions_restart_on_every_rank() -> Any:
    def restarted(batch: MicroBatch, sharding: Any) -> MicroBatch:
        shard = shard_for_context(batch, sharding)
        shard.position_ids = torch.arange(shard.input_ids.shape[1]).expand_as(shard.position_ids)
        return shard

    return mock.patch("tests.parity.layouts.shard_for_context", restarted)


Mistake = Callable[[], AbstractContextManager[Any]]


def run_wrongly(hf_dir: str, layout: TestLayout, mistake: Mistake, batches: list[MicroBatch]) -> RankResult:
    with mistake():
        return run_case(hf_dir, layout, {"wrong": batches})["wrong"]


def of_mixed_rows(family: TinyFamily) -> Expected:
    return family.expected("mixed")


def of_packed_rows(family: TinyFamily) -> Expected:
    return family.expected("packed")


def balanced(family: TinyFamily) -> Expected:
    return expected(family.model(), family.micro_batches("mixed"), partial(balancing_loss, "transformers"))


@pytest.mark.parametrize(
    ("family", "layout", "right", "mistake", "concerned"),
    [
        (GEMMA3, CP2, of_mixed_rows, gradients_of_sent_keys_are_lost, "k_proj.weight"),
        (QWEN3_VL, CP2, of_packed_rows, features_in_the_order_of_their_encoders, "vision_tower."),
        (QWEN3_VL, CP2, of_mixed_rows, positions_restart_on_every_rank, "q_proj.weight"),
        (QWEN3_VL_MOE, BALANCED, balanced, gradients_of_the_balance_are_not_summed, "gate.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_mistakes_show(
    family: TinyFamily,
    layout: TestLayout,
    right: Callable[[TinyFamily], Expected],
    mistake: Mistake,
    concerned: str,
    tmp_path: Path,
) -> None:
    """In the gradients of the parameters that they concern."""
    theirs = right(family)
    found = run_ranks(2, run_wrongly, family.write(tmp_path), layout, mistake, theirs.micro_batches)[0]
    errors = {
        name: relative_error(gradient.reshape(theirs.gradients[name].shape), theirs.gradients[name])
        for name, gradient in found.gradients.items()
        if concerned in name and theirs.gradients[name].any()
    }
    assert errors
    print(f"\n{mistake.__name__}: {max(errors.values()):.1e}")
    assert max(errors.values()) >= CLEARLY_WRONG
