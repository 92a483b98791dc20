"""Ranks that `srun` starts without torchrun: Slurm's variables become those that torchrun sets.

Only inside a step of several tasks: in a batch script, or in a step of one task, a process is the only rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from megatron_vlm.errors import LaunchError

FIRST_PORT, NUM_PORTS = 20000, 12000  # below the ports that the system gives to clients
PORTS_BETWEEN_STEPS = 101


def join_slurm_step(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE and the like for a task of an `srun` step, unless torchrun has set them.

    Ranks are numbered node by node, whatever `srun --distribution` says, so that the groups that communicate most stay
    inside a node. MASTER_ADDR and MASTER_PORT are kept where they are set.

    Args:
        environment: where Slurm's variables are read and the others are set.

    Returns:
        Whether this process is one of several tasks of a step.

    Raises:
        LaunchError: a variable is missing or makes no sense.
    """
    if "RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "") in ("", "0", "1"):
        return False
    try:
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        node, local_rank = int(environment["SLURM_NODEID"]), int(environment["SLURM_LOCALID"])
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        first_host = first_of_node_list(environment["SLURM_STEP_NODELIST"])
        local_size = tasks[node]
    except (LookupError, ValueError) as error:
        raise LaunchError(
            f"this process is a task of a Slurm step, whose variables cannot be understood ({error!r})",
            "environment",
            "start it by srun, or by torchrun",
        ) from None
    environment.update(
        {
            "RANK": str(sum(tasks[:node]) + local_rank),
            "WORLD_SIZE": str(sum(tasks)),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(local_size),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(len(tasks)),
        }
    )
    environment.setdefault("MASTER_ADDR", first_host)
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + PORTS_BETWEEN_STEPS * step) % NUM_PORTS))
    return True


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of every node from Slurm's short form, for example [4, 4, 2] from "4(x2),2".

    Raises:
        ValueError: the text has another form.
    """
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{text!r} does not list tasks per node")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def first_of_node_list(text: str) -> str:
    """Return the first host of Slurm's short form of a list, for example "gpu03" from "gpu[03-07,12],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", text)
    if first is None:
        raise ValueError(f"{text!r} does not list nodes")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])
