"""Five AdamW steps follow torch.optim.AdamW on the transformers model, in every layout and with clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from megatron_vlm.config import Config
from megatron_vlm.families import build
from tests.families.parameters import each_layout
from tests.families.rows import GLOBAL_BATCH
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import our_name
from tests.ranks import run_ranks
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import load_multimodal, mean_loss, multimodal_batch, without_key_bias

STEPS, WARMUP = 5, 2
LEARNING_RATE, LOWEST_LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 2e-3, 1e-4, (0.9, 0.95), 1e-6, 0.1, 1.0
MULTIPLIERS = {"vision_tower": 0.5, "projector": 3.0}
HALF = GLOBAL_BATCH // 2  # rows per step: the data are read from the beginning again in step 3
SETTINGS = {
    "train.train_iters": STEPS,
    "train.global_batch_size": HALF,
    "optimizer.lr": LEARNING_RATE,
    "optimizer.min_lr": LOWEST_LEARNING_RATE,
    "optimizer.betas": list(BETAS),
    "optimizer.eps": EPS,
    "optimizer.weight_decay": WEIGHT_DECAY,
    "optimizer.clip_grad": CLIP,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_iters": WARMUP,
    "optimizer.lr_multipliers": MULTIPLIERS,
}

# Adam divides a gradient by its own size, so the few entries whose gradient is near zero move by what rounding leaves
# of it; an eps above that (1e-8 of clipped gradients) keeps them still. Whole tensors are up to 1.3e-4 of the distance
# that they moved off. Decay on the norms, a schedule late by one step or a stale parameter shifts whole tensors by 5e-3
# and more.
TRAJECTORY_TOLERANCE = 5e-4
LOSS_TOLERANCE = 1e-5  # of losses in fp32 after updates that differ so little; seen: 1e-6
# transformers' own norms in fp32 are up to 2.9e-5 from its norms in fp64 (Mistral3, fourth step); ours are about half
# as far from the latter.
NORM_TOLERANCE = 5e-5

# Far below megatron-core's 40 million, so that each layer's parameters arrive in a message of their own.
SMALL_BUCKET_ELEMENTS = 4000


def learning_rate(update: int) -> float:
    """Of update 1, 2, ...: warm-up whose last step has the full rate, then a cosine towards the lowest."""
    if update <= WARMUP:
        return LEARNING_RATE * update / WARMUP
    progress = (update - WARMUP) / (STEPS + 1 - WARMUP)
    return LOWEST_LEARNING_RATE + (LEARNING_RATE - LOWEST_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2


@cache
def reference(files: TinyFiles) -> tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradient norms of the steps; parameters before and after."""
    model = load_multimodal(files.family, files.model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": WEIGHT_DECAY if parameter.dim() > 1 else 0.0,
                "multiplier": MULTIPLIERS.get(our_name(name).partition(".")[0], 1.0),
            }
            for name, parameter in model.named_parameters()
        ],
        betas=BETAS,
        eps=EPS,
    )
    rows = files.rows
    batches = [multimodal_batch(files, rows[start : start + HALF]) for start in range(0, len(rows), HALF)]
    losses, norms = [], []
    for update in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = mean_loss(model, batches[(update - 1) % len(batches)])
        loss.backward()
        _zero_noise_of_routers(model)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update) * group["multiplier"]
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, before, {name: parameter.detach() for name, parameter in model.named_parameters()}


def _zero_noise_of_routers(model: torch.nn.Module) -> None:
    """An expert that no token chose has no gradient in its router's row.

    transformers takes the softmax over all experts and normalises its largest: what cancels there leaves noise of 1e-8
    of the others' gradients, out of which Adam would make steps. Ours is over the chosen ones: nothing need cancel.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            assert parameter.grad is not None
            sizes = parameter.grad.norm(dim=1)
            parameter.grad[sizes < 1e-6 * sizes.max()] = 0.0


def train_with_small_buckets(config: Config) -> None:
    """On a pool rank: with megatron-core's own size a tiny model is one bucket, and nothing would overlap."""
    original = build.DistributedDataParallelConfig
    build.DistributedDataParallelConfig = partial(original, bucket_size=SMALL_BUCKET_ELEMENTS)  # type: ignore[misc]
    try:
        train_on_rank(config)
    finally:
        build.DistributedDataParallelConfig = original  # type: ignore[misc]


@pytest.mark.parametrize(("family", "name"), each_layout("adamw"))
def test_five_steps(
    family: TinyFamily, name: str, multimodal_of: Callable[[TinyFamily], TinyFiles], tmp_path: Path
) -> None:
    layout = family.tables.adamw[name]
    files, export = multimodal_of(family), tmp_path / "hf"
    config = tiny_config(files, tmp_path / "run", SETTINGS | layout.settings() | {"checkpoint.export_hf": str(export)})
    run_ranks(layout.world_size, train_with_small_buckets, config)
    losses, norms, before, expected = reference(files)
    assert max(norms) > 2 * CLIP, "clipping must matter"
    metrics = read_metrics(tmp_path / "run")
    assert [record["loss"] for record in metrics] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert [record["grad_norm"] for record in metrics] == pytest.approx(norms, rel=NORM_TOLERANCE)
    rates = [learning_rate(update) for update in range(1, STEPS + 1)]
    assert [record["lr"] for record in metrics] == pytest.approx(rates, rel=1e-12)
    for part, factor in MULTIPLIERS.items():
        expected_rates = [factor * rate for rate in rates]
        assert [record["lr_by_part"][part] for record in metrics] == pytest.approx(expected_rates, rel=1e-12)
    worst = compare(dict(load_multimodal(files.family, export).named_parameters()), before, expected)
    print(f"\n{family}, {name}: worst error relative to the distance moved {worst:.1e}")


def compare(
    after: dict[str, torch.nn.Parameter], before: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> float:
    assert after.keys() == expected.keys()
    worst = 0.0
    for name, parameter in after.items():
        ours, theirs, old = (without_key_bias(name, t.detach()) for t in (parameter, expected[name], before[name]))
        # A key bias, which nothing depends on, makes steps of full length out of rounding noise.
        assert (parameter.detach() - before[name]).abs().max() <= STEPS * LEARNING_RATE * max(MULTIPLIERS.values()), (
            name
        )
        error = ((ours - theirs).norm() / (theirs - old).norm().clamp(min=1e-12)).item()
        assert error <= TRAJECTORY_TOLERANCE, f"{name}: {error}"
        worst = max(worst, error)
    return worst
