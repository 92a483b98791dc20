"""Ranks of large layouts: that they fit each other, and that it would be noticed if they did not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.hardware import GPUS
from megatron_vlm.planning.plan import Request, make_plan
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.simulated_ranks import RankChecks, RankGroup, check_plan, sample_ranks
from tests.sizes import full
from tests.test_recipes import recipe, record
from tests.training.test_memory import SEQUENCE, TENSOR, family_of, model_config_of, run_config

# The largest recipe of each family: tensor, pipeline, expert size at 64, 1,024 and 16,384 ranks.
LARGEST: dict[str, dict[int, tuple[int, int, int]]] = {
    "gemma3_27b": {64: (8, 2, 1), 1024: (8, 4, 1), 16_384: (8, 8, 1)},
    "gemma4_31b": {64: (8, 2, 1), 1024: (8, 4, 1), 16_384: (8, 4, 1)},
    "gemma4_26b_a4b": {64: (4, 2, 8), 1024: (4, 4, 16), 16_384: (8, 8, 32)},
    "mistral3_24b": {64: (8, 2, 1), 1024: (8, 4, 1), 16_384: (8, 8, 1)},
    "qwen3_vl_235b_a22b": {64: (4, 4, 16), 1024: (4, 8, 32), 16_384: (8, 16, 16)},
}


def scaled(name: str, world_size: int) -> tuple[Config, Layout]:
    """A recipe at another number of ranks, with two micro-batches for each data rank."""
    tensor, pipeline, expert = LARGEST[name][world_size]
    config = recipe(name)[0]
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            pipeline_layout=None,
            expert_model_parallel_size=expert,
        ),
        train=dataclasses.replace(config.train, global_batch_size=2 * world_size // (tensor * pipeline)),
    )
    return config, check_layout(config, record(name)[1], world_size)


SMALL = [("gemma4_26b_a4b", 64), ("qwen3_vl_235b_a22b", 16_384)]
CASES = [(name, size) for name, sizes in LARGEST.items() for size in sizes]


@pytest.mark.parametrize(("name", "world_size"), [case if case in SMALL else full(*case) for case in CASES])
def test_sampled_ranks_agree(name: str, world_size: int) -> None:
    platform.initialize()
    config, layout = scaled(name, world_size)
    family, model_config, _ = record(name)
    checks = RankChecks(config, family, model_config, layout)
    ranks = sample_ranks(layout.world_size)
    checks.check(ranks[-1:] if world_size > 1024 else ranks)
    assert checks.problems == []
    assert checks.num_asked > layout.pipeline_size


def tiny_checks() -> RankChecks:
    platform.initialize()
    overrides = [TENSOR, SEQUENCE, "parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
    config, model_config = run_config(*overrides, "train.global_batch_size=2"), model_config_of("qwen3_vl_moe")
    return RankChecks(config, family_of("qwen3_vl_moe"), model_config, check_layout(config, model_config, 8))


def test_a_rank_that_numbers_its_neighbours_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 takes the ranks of the other data rank for its tensor group."""
    checks = tiny_checks()
    real = checks.groups_of

    def groups_of(rank: int) -> dict[str, RankGroup]:
        found = real(rank)
        return found | {"tp": RankGroup((5, 7), 0)} if rank == 5 else found

    monkeypatch.setattr(checks, "groups_of", groups_of)
    checks.check([4])
    assert any("has rank 5 in its group tp" in problem for problem in checks.problems)


def test_stages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage believes to begin one layer later, and to receive what belongs there."""
    checks = tiny_checks()
    real = checks.chunks_of

    def chunks_of(rank: int) -> list[Any]:
        (chunk,) = real(rank)
        if chunk.receives is None:
            return [chunk]
        first, end = chunk.layers
        return [dataclasses.replace(chunk, layers=(first + 1, end), receives=(1, 1, 1), parameters={})]

    monkeypatch.setattr(checks, "chunks_of", chunks_of)
    checks.check([0])
    said = "\n".join(checks.problems)
    assert "begins with layer 3, not 2" in said and "receives (1, 1, 1), but is sent" in said
    assert "language_model.norm.weight is on no chunk" in said


def test_a_plan_against_real_parameters() -> None:
    checks = tiny_checks()
    request = Request(checks.config, checks.family, checks.model_config, GPUS["H100"], 8, 1.0, 1.0, 0.1)
    plan = make_plan(request, checks.config, checks.layout)
    problems, said = check_plan("5", request, plan)
    assert problems == [] and "rank 5 has " in said
    assert check_plan("sampled", request, plan)[0] == []
    fewer = [dataclasses.replace(entry, num_parameters=entry.num_parameters - 1) for entry in plan.memory]
    problems, said = check_plan("0", request, dataclasses.replace(plan, memory=fewer))
    assert len(problems) == 1 and "planned are" in problems[0] and said == "1 difference"
    for wrong in ("8", "-1", "all"):
        with pytest.raises(ConfigError, match="give sampled, or a rank from 0 to 7"):
            check_plan(wrong, request, plan)


@pytest.mark.parametrize(
    ("name", "virtual", "tower"),
    [("gemma3", 1, [1, 2]), full("gemma3", 2, [1, 2]), full("qwen3_vl_moe", 2, [2, 1, 1]), full("mistral3", 1, [2, 2])],
)
def test_a_spread_tower(name: str, virtual: int, tower: list[int]) -> None:
    """Embedding and head, tied or not, on one chunk or on different ones of the same rank."""
    platform.initialize()
    overrides = [
        *(TENSOR, SEQUENCE, "parallel.pipeline_model_parallel_size=2", "train.global_batch_size=2"),
        f"parallel.virtual_pipeline_model_parallel_size={virtual}",
        f"parallel.vision_pipeline_layout={tower}".replace(" ", ""),
    ]
    config, model_config = run_config(*overrides), model_config_of(name)
    layout = check_layout(config, model_config, 4)
    request = Request(config, family_of(name), model_config, GPUS["H100"], 4, 1.0, 1.0, 0.1)
    problems, said = check_plan("sampled", request, make_plan(request, config, layout))
    assert problems == [] and "rank 3 has " in said


def test_the_sample_is_always_the_same() -> None:
    layout = Layout.over(16_384, tensor_size=8, pipeline_size=16, expert_size=16)
    ranks = sample_ranks(layout.world_size)
    assert ranks[0] == 0 and ranks[-1] == 16_383 and len(ranks) == 4 and ranks == sample_ranks(layout.world_size)
