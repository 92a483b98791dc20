"""Muon in every layout, against emerging_optimizers' Muon on each whole matrix and torch's AdamW on everything else.

Each rank starts from its share of a gradient (tests/checkpoint/tiny_run.py): what follows is the training loop's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import Muon

from tests.checkpoint.test_distributed_layouts import (
    MORE_STEPS,
    STEPS,
    learning_rate,
    load_and_continue,
    load_fails,
    straight_and_resumed,
    train_and_save,
)
from tests.checkpoint.tiny_run import (
    BETAS,
    EPS,
    FROZEN,
    WEIGHT_DECAY,
    Run,
    Settings,
    gradient,
    gradient_norm_at,
    initial_value,
    parameter_shapes,
)
from tests.checkpoint.whole_state import Pieces, assemble, assert_same
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

CLIP = 1.0  # norms are above 40
# Newton-Schulz takes singular values apart that differ by rounding: 3e-6 of a weight's size, seen; orthogonalising
# shards instead of matrices, or several as one, moves updates by about their own size, 2e-3.
TOLERANCE = 2e-5


def reference(num_steps: int, clip_grad: float) -> dict[str, torch.Tensor]:
    """Parameters and state after `num_steps`, under the checkpoint's keys."""
    result = {}
    for name, shape in parameter_shapes().items():
        whole = initial_value(name, shape.sizes)
        result[name] = whole
        if name == FROZEN or not shape.trains:
            continue
        is_matrix = shape.kind == "matrix"
        parts = [torch.nn.Parameter(part.clone()) for part in (matrices(whole) if is_matrix else [whole])]
        optimizer: torch.optim.Optimizer
        if is_matrix:
            optimizer = Muon(
                parts,
                momentum=0.95,
                nesterov=True,
                weight_decay=WEIGHT_DECAY,
                extra_scale_factor=0.2,
                fp32_matmul_prec="highest",
            )
        else:
            decay = WEIGHT_DECAY if shape.kind == "table" else 0.0
            optimizer = torch.optim.AdamW(parts, betas=BETAS, eps=EPS, weight_decay=decay)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            whole_gradient = gradient(name, shape.sizes, step) * min(1.0, clip_grad / gradient_norm_at(step))
            gradients = matrices(whole_gradient) if is_matrix else [whole_gradient]
            for part, of_part in zip(parts, gradients, strict=True):
                part.grad = of_part.clone()
            optimizer.step()
        result[name] = torch.stack([part.detach() for part in parts]).reshape(shape.sizes)
        for kind in ("momentum_buffer",) if is_matrix else ("exp_avg", "exp_avg_sq"):
            values = [optimizer.state[part][kind] for part in parts]
            result[f"optimizer.state.{kind}.{name}"] = torch.stack(values).reshape(shape.sizes)
    return result


def matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.reshape(-1, *tensor.shape[-2:]))


def assert_follows_reference(whole: dict[str, torch.Tensor], num_steps: int, clip_grad: float) -> None:
    expected = reference(num_steps, clip_grad)
    assert expected.keys() == {key for key in whole if ".param." not in key and ".fp32_param." not in key}
    for key, value in expected.items():
        torch.testing.assert_close(whole[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)


def train(layout: TestLayout) -> list[tuple[list[float], Pieces]]:
    """With state whole on each rank, sharded, and sharded with exchanges in the background: norms and tensors."""
    results = []
    for sharded, overlap in ((False, False), (True, False), (True, True)):
        settings = Settings(
            layout, "muon", distributed_optimizer=sharded, overlap_param_gather=overlap, clip_grad=CLIP
        )
        run = Run(settings, "unused")
        run.train(2)
        for chunk in run.chunks if overlap else []:  # what the next forward pass would wait for
            chunk.start_param_sync(force_sync=True)
        results.append((run.norms, run.pieces()))
    return results


@pytest.mark.parametrize(
    "layout",
    [
        TestLayout(),
        full(TestLayout(2)),
        full(TestLayout(2, tensor=2)),
        full(TestLayout(2, pipeline=2)),
        full(TestLayout(4, tensor=2)),
        full(TestLayout(4, expert=2)),
        TestLayout(4, expert=2, expert_tensor=2),
        full(TestLayout(4, tensor=2, expert=4)),
        full(TestLayout(4, tensor=4)),
        TestLayout(4, tensor=2, pipeline=2),
        full(TestLayout(4, pipeline=2, expert_tensor=2)),
    ],
    ids=str,
)
def test_update(layout: TestLayout) -> None:
    for results in zip(*run_ranks(layout.world_size, train, layout), strict=True):
        assert results[0][0] == pytest.approx([gradient_norm_at(step) for step in range(2)], rel=1e-6)
        assert all(norms == results[0][0] for norms, _ in results)
        assert_follows_reference(assemble([found for _, found in results]), 2, CLIP)
