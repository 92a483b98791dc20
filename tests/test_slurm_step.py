"""Ranks of an `srun` step without torchrun; tests/slurm starts real ones."""

from __future__ import annotations

import pytest

from megatron_vlm.errors import LaunchError
from megatron_vlm.slurm_step import first_of_node_list, join_slurm_step, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "31",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "gpu[007-008],login1",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "3",
}


def test_ranks_are_numbered_node_by_node() -> None:
    """Whatever number Slurm gives the task, and with a different number of tasks on each node."""
    environment = dict(STEP)
    assert join_slurm_step(environment)
    assert {name: value for name, value in environment.items() if name not in STEP} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "2",
        "GROUP_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "20233",
    }


def test_what_is_set_is_kept() -> None:
    environment = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert join_slurm_step(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    "environment",
    [{}, {**STEP, "RANK": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "31", "SLURM_NTASKS": "8"}],
    ids=["elsewhere", "torchrun", "step of one task", "batch script"],
)
def test_other_processes_are_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert not join_slurm_step(environment) and environment == before


@pytest.mark.parametrize("change", [{"SLURM_STEP_TASKS_PER_NODE": "two"}, {"SLURM_NODEID": "3"}, {"SLURM_LOCALID": ""}])
def test_nonsense_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="cannot be understood"):
        join_slurm_step({**STEP, **change})


def test_short_forms() -> None:
    assert tasks_per_node("4") == [4] and tasks_per_node("8(x3),1,2(x2)") == [8, 8, 8, 1, 2, 2]
    names = {"n1": "n1", "n[2-4,7]": "n2", "a[01]-b[3,9],c": "a01-b3", "x1,x[2-3]": "x1"}
    assert {text: first_of_node_list(text) for text in names} == names
