"""Each parameter's declared rule (shard, partial sum over tensor ranks, whole) is the true one, in every layout.

Gradients are taken before `finalize_gradients`: what a rank's own backward pass left. Then, for every parameter, the
parts put together, or the sum over ranks, or each rank's own must equal transformers' gradient, and only the one that
the parameter declares may.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed
from megatron.core.utils import get_model_config

from megatron_vlm.parallel.gradients import is_partial
from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import (
    TOLERANCE,
    ZERO_GRADIENT,
    loss_sum_gradients,
    micro_batches,
    relative_error,
    write_model,
)
from tests.parity.layouts import LAYOUTS, gather_parameter, set_up
from tests.ranks import run_ranks

# Odd numbers of images (a tensor rank of the divided tower gets a blank one), and a micro-batch without any.
CASES = ("several images", "text", "mixed")
# Where a rule does not hold, some value is off by far more than rounding: each rank adds its own heads, places, images.
CLEARLY_WRONG = 1e-2


@dataclass
class Raw:
    """One parameter on one rank: its rule, and its gradient as the rank has it, summed, or put together."""

    sharded: bool
    partial: bool
    own: torch.Tensor
    total: torch.Tensor
    whole: torch.Tensor


def raw_gradients(hf_dir: str, layout_name: str, cases: tuple[str, ...]) -> dict[str, Raw]:
    model, groups = set_up(hf_dir, LAYOUTS[layout_name])
    get_model_config(model[0]).finalize_model_grads_func = None
    for chunk in model:
        chunk.zero_grad_buffer()
    run_global_batch(model, micro_batches(cases), groups)
    found = {}
    for name, parameter in model[0].module.named_parameters():
        own = parameter.main_grad.clone()
        total = own.clone()
        torch.distributed.all_reduce(total, group=groups.tp)
        whole = gather_parameter(parameter, own, groups)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        found[name] = Raw(sharded, is_partial(parameter), own, total, whole)
    return found


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """By whether the model has eyes; the one without has a head of its own."""
    return {
        True: write_model(Path(tmp_path_factory.mktemp("vision"))),
        False: write_model(Path(tmp_path_factory.mktemp("text")), with_vision=False, tied=False),
    }


def check_rule(name: str, ranks: list[Raw], reference: torch.Tensor) -> None:
    first = ranks[0]
    assert all((raw.sharded, raw.partial) == (first.sharded, first.partial) for raw in ranks)
    if first.sharded:
        assert not first.partial, f"{name} is a shard, whose gradient is whole"
        assert relative_error(first.whole, reference) <= TOLERANCE, f"{name} is not a shard along its dimension"
        return
    own = max(relative_error(raw.own, reference) for raw in ranks)
    total = relative_error(first.total, reference)
    right, wrong = (total, own) if first.partial else (own, total)
    rule = "summed over tensor ranks" if first.partial else "left as it is on each rank"
    assert right <= TOLERANCE, f"{name} is {rule}, which is off by {right:.1e} (the other rule: {wrong:.1e})"
    assert wrong >= CLEARLY_WRONG, f"{name}: the test cannot tell its two rules apart"


VISION_LAYOUTS = ("TP2", "TP2+SP", "TP4", "TP4+SP", "TP2, vision DP", "TP2+SP, vision DP", "TP4, vision DP")
TEXT_LAYOUTS = ("TP2", "TP2+SP", "TP4")


@pytest.mark.parametrize(
    ("layout", "with_vision"), [(name, True) for name in VISION_LAYOUTS] + [(name, False) for name in TEXT_LAYOUTS]
)
def test_every_parameter_declares_its_rule(hf_dirs: dict[bool, str], layout: str, with_vision: bool) -> None:
    cases = CASES if with_vision else ("text",)
    reference = loss_sum_gradients(cases, with_vision, tied=with_vision)
    ranks = run_ranks(LAYOUTS[layout].world_size, raw_gradients, hf_dirs[with_vision], layout, cases)
    assert all(set(found) == set(reference) for found in ranks)
    for name, gradient in reference.items():
        raw = [found[name] for found in ranks]
        if name.endswith(ZERO_GRADIENT):
            # Other gradients reach 10 here; terms of that size cancel to rounding.
            assert all(part.own.abs().max() <= 1e-5 for part in raw), name
            continue
        check_rule(name, raw, gradient)
    kinds = {(raw.sharded, raw.partial) for raw in ranks[0].values()}
    assert (True, False) in kinds
    assert (False, True) in kinds, "query and key norms act on a rank's own heads"
