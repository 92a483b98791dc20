"""The gradient norm, the clipped step and the loss mean equal transformers' own, whatever each rank holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.config import OptimizerSettings
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.parity import gemma3_tiny
from tests.parity.gemma3_tiny import LENGTH, ROWS, make_batch, split_rows
from tests.parity.layouts import TestLayout, gather_parameter, hf_gradients, own_micro_batches, set_up
from tests.ranks import run_ranks

# A replica counted twice, or a share left out, moves the norm by 1e-3 or more; sums in another order by 4e-7 at most.
NORM_TOLERANCE = 5e-6
# fp32 gradients in another order of sums (tests/parity), and the rounding of weight - gradient, both about 1e-6 of 1.
STEP_TOLERANCE = 1e-5
CLIP = 0.5  # far below every norm here
SETTINGS = OptimizerSettings(lr=1.0, weight_decay=0.0)

LAYOUTS = {
    "TP1": TestLayout(),
    "TP2": TestLayout(2, tensor=2),
    "TP2+SP": TestLayout(2, tensor=2, sequence_parallel=True),
    "TP4, keys and values replicated": TestLayout(4, tensor=4),
    "PP2, tied embedding on both": TestLayout(2, pipeline=2),
    "TP2, vision DP": TestLayout(2, tensor=2, vision="data"),
    "TP2xPP2": TestLayout(4, tensor=2, pipeline=2),
    "DP2, distributed optimizer": TestLayout(2, distributed_optimizer=True),
    "DP2xPP2, distributed optimizer, overlapped": TestLayout(4, pipeline=2, distributed_optimizer=True, overlap=True),
    "DP2xTP2, distributed optimizer, vision DP": TestLayout(4, tensor=2, distributed_optimizer=True, vision="data"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    gemma3_tiny.build(with_vision=True).save_pretrained(path)
    return path


def step(directory: str, layout: TestLayout, batches: list[MicroBatch]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """On a rank: norm and mean loss, and without the distributed optimizer what one clipped SGD step subtracts."""
    model, groups = set_up(directory, layout)
    settings = SETTINGS if layout.distributed_optimizer else OptimizerSettings("sgd", lr=1.0, weight_decay=0.0)
    optimizer = build_optimizer(model, settings, torch.float32, layout.distributed_optimizer, groups)
    before = _values(model, groups)
    loss_sum, label_tokens = run_global_batch(model, own_micro_batches(batches, groups, layout), groups)[0].tolist()
    norm = gradient_norm(optimizer)
    subtracted = {}
    if not layout.distributed_optimizer:
        apply_gradients(optimizer, norm, CLIP)
        subtracted = {name: before[name] - value for name, value in _values(model, groups).items()}
    return norm, loss_sum / max(label_tokens, 1), subtracted


def _values(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, torch.Tensor]:
    return {
        name: gather_parameter(parameter, parameter.data, groups)
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
    }


def reference(batches: list[MicroBatch]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Norm, mean loss over all label tokens and gradients, by transformers."""
    model = gemma3_tiny.build(with_vision=True).train()
    counts = [int((batch.labels != -100).sum()) for batch in batches]
    total = torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        if count:  # the mean over no token is nan
            total = total + gemma3_tiny.reference(model, batch)[1] * count / sum(counts)
    total.backward()
    gradients = hf_gradients(model)
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt()
    return norm.item(), total.item(), gradients


def check(directory: Path, layout: TestLayout, batches: list[MicroBatch]) -> None:
    norm, loss, gradients = reference(batches)
    factor = CLIP / norm
    assert factor < 1
    for our_norm, our_loss, subtracted in run_ranks(layout.world_size, step, str(directory), layout, batches):
        assert our_norm == pytest.approx(norm, rel=NORM_TOLERANCE)
        assert our_loss == pytest.approx(loss, rel=1e-6)
        for name, ours in subtracted.items():
            theirs = gradients[name] * factor
            assert (ours[: len(theirs)] - theirs).abs().max() <= STEP_TOLERANCE, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_norm_and_clipped_step(name: str, directory: Path) -> None:
    check(directory, LAYOUTS[name], split_rows(make_batch(ROWS["mixed"])))


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_ranks_with_unequal_label_tokens(distributed_optimizer: bool, directory: Path) -> None:
    """Four data ranks, two micro-batches of two rows each: one rank has no label, one a few, one no image."""
    rows = [[(LENGTH, [2]), (20, [])], [(18, [4]), (9, [])], [(LENGTH, []), (14, [])], [(12, [1]), (LENGTH, [3, 12])]]
    batches = [make_batch(rows[rank], seed=7 * turn + rank) for turn in range(2) for rank in range(4)]
    for turn in range(2):
        batches[4 * turn].labels.fill_(-100)
        batches[4 * turn + 1].labels[:, 3:] = -100
    check(directory, TestLayout(4, distributed_optimizer=distributed_optimizer), batches)
