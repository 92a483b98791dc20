"""What ranks check together at a start, each with a rank that is not like the others."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from megatron_vlm.cli import load_config
from megatron_vlm.errors import LaunchError
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.placement import Node
from megatron_vlm.training import rank_checks
from tests.ranks import run_ranks
from tests.training.loop_run import Place, build_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def problem_on(odd_rank: int, what: str, arguments: list[str]) -> str | None:
    """On a rank: what is said if one rank has something else."""
    hf_config: dict[str, Any] = {"model_type": "gemma3"}
    kept = rank_checks._code_digest, rank_checks._version
    if torch.distributed.get_rank() >= odd_rank:
        arguments = [*arguments, "--optimizer.lr=1e-5"] if what == "configuration" else arguments
        hf_config["hidden_size"] = 8 if what == "model configuration" else 4
        if what == "code of megatron_vlm":
            rank_checks._code_digest = lambda: 1
        if what == "package versions":
            rank_checks._version = lambda name: "0.1"
    else:
        hf_config["hidden_size"] = 4
    try:
        rank_checks.check_same_program(load_config(arguments), hf_config)
    except LaunchError as error:
        return str(error)
    finally:
        rank_checks._code_digest, rank_checks._version = kept
    return None


@pytest.mark.parametrize("what", ["configuration", "model configuration", "code of megatron_vlm", "package versions"])
def test_ranks_that_differ(place: Place, tmp_path: Path, what: str) -> None:
    """Every rank fails with the same words, which name the first rank that differs."""
    said = run_ranks(4, problem_on, 2, what, place.arguments(tmp_path))
    assert said == [f"rank 2 differs from rank 0 in its {what} -- {said[0].partition(' -- ')[2]}"] * 4


def test_ranks_that_are_alike(place: Place, tmp_path: Path) -> None:
    assert run_ranks(4, problem_on, 4, "", place.arguments(tmp_path)) == [None] * 4


def report_with_slow(rank: int | None) -> list[str]:
    """On a rank: the report on groups; those of one rank are slow."""
    layout = Layout.over(4, tensor_size=2)
    groups = build_groups(layout, timedelta(seconds=60))
    kept = rank_checks._seconds_to_sum

    def slow(sample: torch.Tensor, group: torch.distributed.ProcessGroup) -> float:
        seconds = kept(sample, group)
        members = torch.distributed.get_process_group_ranks(group)
        return seconds + 5.0 * (rank is not None and group is groups.tp and rank in members)

    rank_checks._seconds_to_sum = slow
    try:
        return rank_checks.measure_groups(groups, [Node("a", range(2)), Node("b", range(2, 4))])
    finally:
        rank_checks._seconds_to_sum = kept


def test_slow_group_is_named() -> None:
    first, *others = run_ranks(4, report_with_slow, 3)
    assert others == [[], [], []]
    figures, *warnings = first  # on a busy machine another kind of group may be slow indeed
    assert re.fullmatch(r"groups    GB/s to sum 0.25 MiB: tensor \d+\.\d\d, data \d+\.\d\d", figures)
    assert [line for line in warnings if re.search("the tensor group of rank [23] on b takes", line)]


def test_groups_alike_are_not_warned_of() -> None:
    nodes = [Node("a", range(2)), Node("b", range(2, 4))]
    assert rank_checks._bandwidth(2, 10**7, [0.010, 0.010, 0.015, 0.015]) == 1e9  # 2 (n - 1) / n x 10 MB in 10 ms
    assert rank_checks._slowness("tensor", [0.010, 0.010, 0.015, 0.015], nodes) == []
    assert rank_checks._slowness("tensor", [1e-6, 1e-6, 1e-4, 1e-4], nodes) == []  # nothing that anybody would notice
    (warning,) = rank_checks._slowness("tensor", [0.010, 0.010, 0.010, 0.030], nodes)
    assert "rank 3 on b takes 3.0 times" in warning
