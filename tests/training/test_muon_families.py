"""A Muon step on each family's model, from transformers' gradients, in layouts that shard matrices in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import Muon

from megatron_vlm.config import OptimizerSettings
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.families import FAMILIES
from tests.families.qwen3_vl import QWEN3_VL_MOE
from tests.families.rows import GLOBAL_BATCH
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import Expected
from tests.parity.layouts import LAYOUTS, TestLayout, gather_parameter, own_micro_batches, set_up
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import without_key_bias

# Without decay, so that an update is all that a parameter moves by. A small eps would make AdamW's full steps out of
# gradients that are rounding noise.
SETTINGS = OptimizerSettings(
    "muon", lr=1e-2, weight_decay=0.0, eps=1e-4, clip_grad=0.0, muon_fp32_matmul_prec="highest"
)
# Of an update's norm. Newton-Schulz multiplies what is small in a gradient: its rounding of 1e-6 becomes 6e-5.
# AdamW divides by the gradient: of a few hundred times `eps`, 1e-3.
MATRIX_TOLERANCE, TOLERANCE = 1e-4, 2e-3
# It sees fewer positions than it has rows: most of its gradient's singular values are rounding, 1e-8 of the largest.
RANK_DEFICIENT = "relative_k_proj.weight"

Updates = dict[str, tuple[str, torch.Tensor]]
"""Kinds of parameters and their updates, whole, by name."""


def step(directory: str, layout: TestLayout, batches: list[MicroBatch]) -> Updates:
    model, groups = set_up(directory, layout)
    optimizer = build_optimizer(model, SETTINGS, torch.float32, layout.distributed_optimizer, groups)
    parameters = [(name, parameter) for chunk in model for name, parameter in chunk.module.named_parameters()]
    before = [gather_parameter(parameter, parameter.data, groups) for _, parameter in parameters]
    run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)
    apply_gradients(optimizer, gradient_norm(optimizer), SETTINGS.clip_grad)
    return {
        name: (spec_of(parameter).kind, gather_parameter(parameter, parameter.data, groups) - old)
        for (name, parameter), old in zip(parameters, before, strict=True)
    }


def expected_update(kind: str, gradient: torch.Tensor) -> torch.Tensor:
    """What the libraries' own optimizers do to a parameter [..., out, in] of zeros."""
    parts = list(gradient.reshape(-1, *gradient.shape[-2:])) if kind == "matrix" else [gradient]
    parameters = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.clone()
    optimizer: torch.optim.Optimizer
    if kind == "matrix":
        optimizer = Muon(
            parameters,
            lr=SETTINGS.lr,
            momentum=0.95,
            nesterov=True,
            weight_decay=0.0,
            extra_scale_factor=0.2,
            fp32_matmul_prec="highest",
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters, lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=0.0
        )
    optimizer.step()
    return torch.stack([parameter.detach() for parameter in parameters]).reshape(gradient.shape)


def check(updates: Updates, theirs: Expected) -> None:
    for name, (kind, ours) in updates.items():
        gradient = theirs.gradients.get(name)
        if kind == "buffer" or gradient is None or not gradient.any():
            assert not ours.any(), name
            continue
        if kind == "table":  # without the vocabulary's padding
            ours = ours.flatten()[: gradient.numel()]
        expected = expected_update(kind, gradient.reshape(ours.shape))
        # Nothing depends on a key's bias: its gradient is rounding noise.
        ours, expected = (without_key_bias(name, update) for update in (ours, expected))
        error = ((ours - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        is_exact = kind == "matrix" and not name.endswith(RANK_DEFICIENT)
        assert error <= (MATRIX_TOLERANCE if is_exact else TOLERANCE), f"{kind} {name}: {error}"


WHOLE = {"distributed_optimizer": True, "whole_matrices": True}
CHOSEN = {
    "TP2+SP": LAYOUTS["TP2+SP"],
    "TP4+SP": LAYOUTS["TP4+SP"],  # more ranks than heads of keys and values
    "PP2": LAYOUTS["PP2"],
    "DP2, sharded": TestLayout(2, **WHOLE),
    "DP2, sharded and overlapped": TestLayout(2, overlap=True, **WHOLE),
    "CP2, sharded": TestLayout(2, context=2, **WHOLE),
    "TP2, vision DP": LAYOUTS["TP2, vision DP"],
    "TP2xPP2+SP": LAYOUTS["TP2xPP2+SP"],
    "EP2, sharded": TestLayout(2, expert=2, **WHOLE),
    "EP2xETP2, TP2+SP, sharded": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2, **WHOLE),
    "TP2+SP, sharded": TestLayout(2, tensor=2, sequence_parallel=True, **WHOLE),  # experts have two data ranks
}
IN_DEFAULT = {("gemma3", "TP2+SP"), ("qwen3_vl_moe", "EP2xETP2, TP2+SP, sharded"), ("qwen3_vl", "TP4+SP")}
CASES = [
    (pytest.param if (str(family), name) in IN_DEFAULT else full)(family, name, id=f"{family}, {name}")
    for family in FAMILIES
    for name, layout in CHOSEN.items()
    if "mixed" in family.cases and (layout.expert == 1 or family.has_experts)
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_one_step(family: TinyFamily, name: str, tmp_path: Path) -> None:
    layout, theirs = CHOSEN[name], family.expected("mixed")
    for updates in run_ranks(layout.world_size, step, family.write(tmp_path), layout, theirs.micro_batches):
        check(updates, theirs)


def test_a_run(multimodal_of: Callable[[TinyFamily], TinyFiles], tmp_path: Path) -> None:
    """Five steps of the loop, stopped and resumed, in another layout than one rank's: the same losses and norms."""
    files = multimodal_of(QWEN3_VL_MOE)
    settings = {
        "train.train_iters": 5,
        "train.global_batch_size": GLOBAL_BATCH // 2,
        "optimizer.name": "muon",
        "optimizer.lr": 2e-3,
        "optimizer.eps": 1e-6,
        "optimizer.lr_multipliers": {"vision_tower": 0.5},
        "optimizer.muon_fp32_matmul_prec": "highest",
    }
    figures = []
    for layout in (TestLayout(), TestLayout(4, tensor=2, sequence_parallel=True, expert=2, overlap=True, **WHOLE)):
        folder = tmp_path / str(layout.world_size)
        for stop in ({"train.exit_interval": 3}, {}):
            run_ranks(layout.world_size, train_on_rank, tiny_config(files, folder, settings | layout.settings() | stop))
        figures.append([(record["loss"], record["grad_norm"]) for record in read_metrics(folder)])
    assert len(figures[0]) == 5 and figures[0][-1][0] < figures[0][0][0]
    assert np.array(figures[1]) == pytest.approx(np.array(figures[0]), rel=1e-4)
