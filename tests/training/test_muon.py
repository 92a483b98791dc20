"""Muon in every layout, against emerging_optimizers' Muon on each whole matrix and torch's AdamW on everything else.

Each rank starts from its share of a gradient (tests/checkpoint/tiny_run.py): what follows is the training loop's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import Muon

from megatron_vlm.errors import ConfigError
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
        settings = Settings(layout, "muon", distributed_optimizer=sharded, overlap_param_gather=overlap, clip_grad=CLIP)
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


SOURCE = Settings(TestLayout(4, tensor=2, pipeline=2, expert=2), "muon")
UNSHARDED = replace(SOURCE, distributed_optimizer=False)


@pytest.fixture(scope="module", params=[SOURCE, UNSHARDED], ids=["sharded", "unsharded"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict]]:
    folder = str(tmp_path_factory.mktemp("source"))
    ranks = request.param.layout.world_size
    yield folder, assemble(run_ranks(ranks, train_and_save, request.param, folder))


@pytest.mark.parametrize(
    "settings",
    [
        full(Settings(TestLayout(), "muon", distributed_optimizer=False)),
        full(Settings(TestLayout(4), "muon")),
        Settings(TestLayout(4, tensor=2, expert=2, expert_tensor=2), "muon"),
        Settings(TestLayout(2, pipeline=2, virtual=2), "muon", distributed_optimizer=False),
        full(Settings(TestLayout(4, tensor=4), "muon")),
    ],
    ids=lambda settings: f"{settings.layout}{'' if settings.distributed_optimizer else ', unsharded'}",
)
def test_continues_in_another_layout(source: tuple[str, dict], settings: Settings) -> None:
    folder, saved = source
    results = run_ranks(settings.layout.world_size, load_and_continue, settings, folder)
    loaded = assemble([loaded for loaded, *_ in results])
    assert_same(*({key: value for key, value in state.items() if ".param." not in key} for state in (saved, loaded)))
    assert_follows_reference(assemble([after for _, after, *_ in results]), STEPS + MORE_STEPS, math.inf)
    for _, _, resumed, norms in results:
        assert norms == pytest.approx([gradient_norm_at(STEPS + step) for step in range(MORE_STEPS)], rel=1e-6)
        assert resumed.step == STEPS


@pytest.mark.parametrize(
    "settings",
    [
        full(Settings(TestLayout(2, tensor=2, expert_tensor=2), "muon")),
        Settings(TestLayout(4, tensor=2, expert=2), "muon", bf16=True),
        Settings(TestLayout(2), "muon", overlap_param_gather=True),
        full(Settings(TestLayout(4, pipeline=2, virtual=2), "muon", bf16=True)),
        full(Settings(TestLayout(2, expert=2), "muon", distributed_optimizer=False, bf16=True)),
    ],
    ids=lambda settings: f"{settings.layout}{', bf16' if settings.bf16 else ''}",
)
def test_same_layout_continues_bit_for_bit(settings: Settings, tmp_path: Path) -> None:
    for straight, resumed in run_ranks(settings.layout.world_size, straight_and_resumed, settings, str(tmp_path)):
        assert_same(straight, resumed)


@pytest.mark.parametrize("sharded", [True, False], ids=["from sharded", "to sharded"])
def test_bf16_main_weights_reach_the_other_kind(sharded: bool, tmp_path: Path) -> None:
    """From sharded state to whole, and back."""
    source = Settings(TestLayout(4, tensor=2), "muon", distributed_optimizer=sharded, bf16=True)
    target = replace(source, layout=TestLayout(4, pipeline=2), distributed_optimizer=not sharded)
    saved = assemble(run_ranks(4, train_and_save, source, str(tmp_path)))
    loaded = assemble([loaded for loaded, *_ in run_ranks(4, load_and_continue, target, str(tmp_path))])
    assert any(".param." in key or ".fp32_param." in key for key in saved)
    assert_same(*map(_with_one_main_prefix, (saved, loaded)))


def _with_one_main_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".fp32_param.", ".param."): value for key, value in state.items()}


@pytest.mark.parametrize("saved", ["adamw", "muon"])
def test_another_optimizer_is_refused(saved: str, tmp_path: Path) -> None:
    other = {"adamw": "muon", "muon": "adamw"}[saved]
    run_ranks(1, train_and_save, Settings(optimizer=saved), str(tmp_path))
    (message,) = run_ranks(1, load_fails, Settings(optimizer=other), str(tmp_path))
    assert f"saved by optimizer {saved}, this run uses {other}" in message


MATRICES = r"(?!.*(q_proj|o_proj|experts))"  # freezes all but these


@pytest.mark.parametrize(
    ("layout", "freeze"),
    [
        full(TestLayout(2), MATRICES),
        (TestLayout(4, pipeline=2), MATRICES + r"(?!language_model\.norm)"),  # AdamW has nothing on the first stage
        full(TestLayout(2), r".*layers\.[01]|language_model\.embed|vision_tower"),
    ],
    ids=["matrices", "matrices and a norm", "some"],
)
def test_frozen_parameters(layout: TestLayout, freeze: str, tmp_path: Path) -> None:
    settings = Settings(layout, "muon", freeze=freeze, bf16=True)
    before, after = run_ranks(layout.world_size, straight_and_resumed, settings, str(tmp_path))[0]
    assert_same(before, after)
    settings = replace(settings, bf16=False)
    trained = assemble(run_ranks(layout.world_size, train_and_save, settings, str(tmp_path / "fp32")))
    for key, value in reference(STEPS, math.inf).items():
        if re.match(freeze, key.removeprefix("optimizer.state.momentum_buffer.")):
            is_state = key.startswith("optimizer.")
            assert is_state or torch.equal(trained[key], initial_value(key, tuple(value.shape))), key
        elif not key.startswith("optimizer.state.exp"):
            torch.testing.assert_close(trained[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)


def no_matrix(settings: Settings) -> str:
    with pytest.raises(ConfigError) as caught:
        Run(settings, "unused")
    return str(caught.value)


def test_nothing_but_tables_and_vectors() -> None:
    settings = Settings(TestLayout(2, pipeline=2), "muon", freeze=r".*(q_proj|o_proj|experts|odd_rows)|" + FROZEN)
    for message in run_ranks(2, no_matrix, settings):
        assert message == "optimizer.name muon updates matrices, of which none trains -- use adamw"
