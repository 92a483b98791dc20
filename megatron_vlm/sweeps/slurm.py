"""What a sweep asks of Slurm: a test of its job, the job array itself, and the states of its tasks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.errors import ConfigError, LaunchError
from megatron_vlm.sweeps.checks import index_ranges
from megatron_vlm.sweeps.manifest import JOBS_NAME, Sweep, read_lines
from megatron_vlm.sweeps.points import Point

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "sweep.sbatch"
_TIMEOUT_SECONDS = 120
_OURS = ("--parsable", "--output", "--chdir")  # options that resources do not decide
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class Task:
    """A task of a job array.

    Attributes:
        name: job and index, such as 123_4.
        state: Slurm's word.
        nodes: where it runs; empty if it does not.
        reason: why it waits.
    """

    name: str
    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is going to start."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in _RUNNING


def is_available() -> bool:
    """Return whether this machine can submit jobs: Slurm is installed, and its controller answers."""
    return shutil.which("sbatch") is not None and _run(["scontrol", "ping"]).returncode == 0


def sbatch_command(sweep: Sweep, points: Sequence[Point]) -> list[str]:
    """Return the command that submits points as one job array."""
    resources = sweep.settings.resources
    limit = f"%{sweep.settings.concurrency}" if sweep.settings.concurrency else ""
    options: dict[str, object] = {
        "job-name": sweep.name,
        "array": index_ranges(point.index for point in points) + limit,
        "output": sweep.folder / "logs" / "%4a.out",
        "chdir": REPOSITORY,
        "nodes": resources.nodes,
        "gpus-per-node": resources.gpus_per_node,
        "cpus-per-task": resources.cpus_per_node,
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *resources.sbatch_options, str(SCRIPT), str(sweep.folder), sys.executable]


def job_environment(sweep: Sweep) -> dict[str, str]:
    """Return the settings of the job's script."""
    resources = sweep.settings.resources
    return {"RANKS_PER_NODE": str(resources.ranks_per_node), "PYTHON": sys.executable, **resources.environment}


def check_with_slurm(sweep: Sweep, points: Sequence[Point]) -> str:
    """Let Slurm judge the job without submitting it; returns what it says, such as when it would start.

    Raises:
        ConfigError: the partition does not exist, the nodes cannot be had, and the like.
    """
    command, *options = sbatch_command(sweep, points)
    done = _run([command, "--test-only", *options])
    said = _words(done.stderr)
    if done.returncode:
        fix = "correct resources in the sweep file; sinfo lists partitions and nodes"
        asked = " ".join(option for option in options if option.startswith("--") and not option.startswith(_OURS))
        raise ConfigError(f"Slurm refuses the job: {said}", asked, fix)
    return said


def submit(sweep: Sweep, points: Sequence[Point]) -> str:
    """Submit points as one job array; returns the job's number.

    Raises:
        LaunchError: Slurm refuses it.
    """
    command = sbatch_command(sweep, points)
    done = _run(command, os.environ | job_environment(sweep))
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or not job.isdecimal():
        raise LaunchError(f"sbatch failed: {_words(done.stderr)}", shlex.join(command), "correct it, and submit again")
    return job


def find_tasks(sweep: Sweep) -> tuple[dict[int, Task], str]:
    """Return the task of each point that Slurm knows, by index: one that waits or runs, else the last.

    Returns:
        The tasks, and why Slurm could not be asked, "" if it could.
    """
    jobs: Mapping[str, list[int]] = {line["job"]: line["indices"] for line in read_lines(sweep.folder / JOBS_NAME)}
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return {}, "there is no squeue here: Slurm's view is missing"
    # Of a job that Slurm has forgotten squeue says "Invalid job id"; asked for all, it leaves it out.
    done = _run(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%F|%K|%T|%N|%r"])
    if done.returncode:
        return {}, f"squeue failed: {_words(done.stderr)}"
    tasks: dict[int, Task] = {}
    order = {job: number for number, job in enumerate(jobs)}
    lines = [line.strip().split("|", 4) for line in done.stdout.splitlines() if line.count("|") >= 4]
    for job, number, state, nodes, reason in sorted(lines, key=lambda line: order.get(line[0], -1)):
        if job not in jobs or not number.isdecimal() or int(number) not in jobs[job]:
            continue
        task, before = Task(f"{job}_{number}", state, nodes, reason), tasks.get(int(number))
        if before is None or task.waits or task.runs or not (before.waits or before.runs):
            tasks[int(number)] = task
    return tasks, ""


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _words(text: str) -> str:
    """Return what a command of Slurm's says, in one line."""
    return re.sub(r"\bs(batch|queue): (error: )?", "", " ".join(text.split())) or "no reason given"
