"""What a run logs about experts is what transformers' router does with the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.ranks import run_ranks
from tests.sizes import two_sizes
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import NO_LOSS, load_multimodal, multimodal_batch

STEPS, ROWS_PER_STEP = 2, 4
# Rows are micro-batches of their own, evaluated in between; the weights stay what they are.
SETTINGS = {
    "train.train_iters": STEPS,
    "train.global_batch_size": ROWS_PER_STEP,
    "train.micro_batch_size": 1,
    "train.eval_interval": 1,
    "train.eval_iters": 1,
    "optimizer.lr": 1e-12,
    "model.moe_load_balancing": "transformers",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2, full recompute": (2, {"parallel.expert_model_parallel_size": 2, "model.recompute": "full"}),
    "TP2xPP2+SP": (
        4,
        {
            "parallel.tensor_model_parallel_size": 2,
            "parallel.pipeline_model_parallel_size": 2,
            "parallel.sequence_parallel": True,
        },
    ),
}


def use_by_transformers(model: PreTrainedModel, files: TinyFiles, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Statistics over layers and experts, and the mean of auxiliary losses weighted by label tokens."""
    tokens: list[torch.Tensor] = []
    balance = label_tokens = 0.0
    for row in rows:
        inputs, labels = multimodal_batch(files, [row])
        with torch.no_grad():
            output = model(**inputs, output_router_logits=True)
        chosen = [logits.topk(model.config.text_config.num_experts_per_tok).indices for logits in output.router_logits]
        num_experts = output.router_logits[0].shape[1]
        tokens.append(torch.stack([each.flatten().bincount(minlength=num_experts) for each in chosen]))
        count = int((labels != NO_LOSS).sum())
        balance += output.aux_loss.item() * count
        label_tokens += count
    total = torch.stack(tokens).sum(0)
    return {
        "expert_tokens_min": total.min().item(),
        "expert_tokens_max": total.max().item(),
        "expert_tokens_mean": total.double().mean().item(),
        "dead_experts": (total == 0).sum(1).max().item(),
        "load_balancing_loss": balance / label_tokens,
    }


@pytest.mark.parametrize("layout", two_sizes(LAYOUTS, "EP2, full recompute"))
def test_metrics_of_experts(layout: str, experts: TinyFiles, tmp_path: Path) -> None:
    """Counted once although layers are computed twice, and without what evaluations send through them."""
    world_size, settings = LAYOUTS[layout]
    valid = {"data.valid": [{"path": str(experts.data.with_name("text.jsonl"))}]}
    run_ranks(world_size, train_on_rank, tiny_config(experts, tmp_path / "run", SETTINGS | valid | settings))
    assert len((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()) == STEPS
    model = load_multimodal(experts.family, experts.model)
    for step, record in enumerate(read_metrics(tmp_path / "run")):
        rows = experts.rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        for name, expected in use_by_transformers(model, experts, rows).items():
            # The loss in fp32 in another order of sums; the rest are whole numbers and their mean.
            assert record[name] == pytest.approx(expected, rel=1e-5), (step, name)
