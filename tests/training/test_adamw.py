"""Five AdamW steps follow torch.optim.AdamW on the transformers model, in every layout and with clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import Config
from megatron_vlm.parallel import build
from tests.ranks import run_ranks
from tests.training.tiny_families import GLOBAL_BATCH
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import load_multimodal, mean_loss, multimodal_batch, without_key_bias

STEPS, WARMUP = 5, 2
LEARNING_RATE, LOWEST_LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 2e-3, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
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
# of it: single entries are up to 0.003 learning rates off, whole tensors up to 5e-5 of the distance that they moved.
# Decay on the norms, a schedule late by one step or a stale parameter shifts whole tensors by 5e-3 and more.
TRAJECTORY_TOLERANCE = 5e-4
LOSS_TOLERANCE = 1e-5  # of losses and norms in fp32 after updates that differ so little; seen: 2e-7

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VIRTUAL, SEQUENCE = "parallel.virtual_pipeline_model_parallel_size", "parallel.sequence_parallel"
EXPERT, EXPERT_TENSOR = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
# Far below megatron-core's 40 million, so that each layer's parameters arrive in a message of their own.
SMALL_BUCKET_ELEMENTS = 4000
OVERLAP = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
WHOLE_OPTIMIZER = {"parallel.use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "DP2": (2, {}),
    "DP2xTP2+SP": (4, {TENSOR: 2, SEQUENCE: True}),
    "PP2": (2, {PIPELINE: 2}),
    "TP2xPP2+SP": (4, {TENSOR: 2, PIPELINE: 2, SEQUENCE: True}),
    "DP2, overlapped": (2, OVERLAP),
    "DP2xPP2, overlapped": (4, {PIPELINE: 2} | OVERLAP),
    "DP2xPP2xVPP2, overlapped": (4, {PIPELINE: 2, VIRTUAL: 2} | OVERLAP),
    "DP2xTP2, vision DP, overlapped": (4, {TENSOR: 2, "model.vision_parallelism": "data"} | OVERLAP),
    "DP2, whole optimizer on each rank": (2, WHOLE_OPTIMIZER),
    "EP2": (2, {EXPERT: 2}),
    "EP2, whole optimizer on each rank": (2, {EXPERT: 2} | WHOLE_OPTIMIZER),
    "EP2xDP2, overlapped": (4, {EXPERT: 2} | OVERLAP),
    "EP2xPP2, overlapped": (4, {EXPERT: 2, PIPELINE: 2} | OVERLAP),
    "ETP2xTP2+SP": (2, {TENSOR: 2, SEQUENCE: True, EXPERT_TENSOR: 2}),
}
OF_FAMILY = {
    "gemma3": [name for name in LAYOUTS if "EP" not in name and "ETP" not in name and name != "TP2xPP2+SP"],
    "qwen3_vl": ["TP2xPP2+SP", "DP2xTP2, vision DP, overlapped"],
    "qwen3_vl_moe": ["TP2xPP2+SP", "DP2, overlapped", *(name for name in LAYOUTS if "EP" in name or "ETP" in name)],
    "mistral3": ["DP2xTP2, vision DP, overlapped"],
}
CASES = [(family, layout) for family, layouts in OF_FAMILY.items() for layout in layouts]


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
                "multiplier": MULTIPLIERS.get(files.family.part_of(name), 1.0),
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


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_five_steps(family: str, layout: str, multimodal_of: Callable[[str], TinyFiles], tmp_path: Path) -> None:
    world_size, layout_settings = LAYOUTS[layout]
    files, export = multimodal_of(family), tmp_path / "hf"
    config = tiny_config(files, tmp_path / "run", SETTINGS | layout_settings | {"checkpoint.export_hf": str(export)})
    run_ranks(world_size, train_with_small_buckets, config)
    losses, norms, before, expected = reference(files)
    assert max(norms) > 2 * CLIP, "clipping must matter"
    metrics = read_metrics(tmp_path / "run")
    assert [record["loss"] for record in metrics] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert [record["grad_norm"] for record in metrics] == pytest.approx(norms, rel=LOSS_TOLERANCE)
    rates = [learning_rate(update) for update in range(1, STEPS + 1)]
    assert [record["lr"] for record in metrics] == pytest.approx(rates, rel=1e-12)
    for part, factor in MULTIPLIERS.items():
        expected_rates = [factor * rate for rate in rates]
        assert [record["lr_by_part"][part] for record in metrics] == pytest.approx(expected_rates, rel=1e-12)
    worst = compare(dict(load_multimodal(files.family, export).named_parameters()), before, expected)
    print(f"\n{family}, {layout}: worst error relative to the distance moved {worst:.1e}")


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
