"""What a sweep asks of Slurm: a test of its job, the job array itself, and the states of its tasks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.errors import ConfigError, LaunchError
from megatron_vlm.sweeps.checks import index_ranges
from megatron_vlm.sweeps.manifest import Sweep, noted_submission, recorded_jobs
from megatron_vlm.sweeps.points import Point

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "sweep.sbatch"
_TIMEOUT_SECONDS = 120
_OURS = ("--parsable", "--output", "--chdir")  # options that resources do not decide
# After these words of sbatch's, or of subprocess's, the controller may have got the job all the same.
_UNKNOWN_OUTCOMES = ("timed out", "Zero Bytes were transmitted", "Unexpected message received")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


class UnknownOutcomeError(LaunchError):
    """Slurm may have got a job or not."""


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
        "output": str(sweep.folder / "logs").replace("%", "%%") + "/%4a.out",
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
    size, last = _max_array_size(), max(point.index for point in points)
    if size is not None and last >= size:
        what = f"the sweep has a point {last}, and tasks of job arrays end at {size - 1} here (Slurm's MaxArraySize)"
        fix = f"divide it into sweeps of at most {size} points, in folders of their own, or have MaxArraySize raised"
        raise ConfigError(what, str(sweep.folder), fix)
    command, *options = sbatch_command(sweep, points)
    done = _run([command, "--test-only", *options])
    said = _words(done.stderr)
    if done.returncode:
        fix = "correct resources in the sweep file; sinfo lists partitions and nodes"
        asked = " ".join(option for option in options if option.startswith("--") and not option.startswith(_OURS))
        raise ConfigError(f"Slurm refuses the job: {said}", asked, fix)
    return said


def submit(sweep: Sweep, points: Sequence[Point], mark: str = "") -> str:
    """Submit points as one job array; returns the job's number.

    Args:
        sweep: the sweep.
        points: of it.
        mark: further argument of the job's script, by which `ask_queue` shows the job.

    Raises:
        UnknownOutcomeError: Slurm may have the job or not.
        LaunchError: Slurm refuses it.
    """
    command = [*sbatch_command(sweep, points), *filter(None, [mark])]
    try:
        done = _run(command, os.environ | job_environment(sweep))
    except KeyboardInterrupt:
        raise _unknown_outcome(sweep, "interrupted") from None
    job = done.stdout.strip().partition(";")[0]
    if done.returncode == 0 and job.isdecimal():
        return job
    if done.returncode == 0 or any(words in done.stderr for words in _UNKNOWN_OUTCOMES):
        raise _unknown_outcome(sweep, _words(done.stderr))
    raise LaunchError(f"sbatch failed: {_words(done.stderr)}", shlex.join(command), "correct it, and submit again")


def _unknown_outcome(sweep: Sweep, said: str) -> UnknownOutcomeError:
    fix = "status shows the points that Slurm has; submit again, which finds the job if there is one"
    return UnknownOutcomeError(f"sbatch may have submitted the job or not: {said}", str(sweep.folder), fix)


@dataclass(frozen=True)
class QueueRow:
    """A task of an array as squeue lists it.

    Attributes:
        job, index: number of the array, and of the task in it.
        state: Slurm's word.
        nodes: where it runs.
        reason: why it waits.
        mark: last argument of its script.
    """

    job: str
    index: str
    state: str
    nodes: str
    reason: str
    mark: str


def ask_queue(users: Iterable[int]) -> tuple[list[QueueRow], str]:
    """Return what squeue lists of users, and why it could not be asked, "" if it could.

    Args:
        users: their numbers.
    """
    if shutil.which("squeue") is None:
        return [], "there is no squeue here"
    # Of a job that Slurm has forgotten squeue says "Invalid job id"; asked for all of users, it leaves it out.
    names = ",".join(map(str, sorted({*users})))
    options = ["--noheader", "--array", "--states=all", "--format=%F|%K|%T|%N|%r|%o"]
    done = _run(["squeue", f"--user={names}", *options])
    if done.returncode:
        return [], f"squeue failed: {_words(done.stderr)}"
    rows = []
    for line in done.stdout.splitlines():
        if line.count("|") >= 5:
            job, index, state, nodes, reason, command = line.strip().split("|", 5)
            rows.append(QueueRow(job, index, state, nodes, reason, command.rpartition(" ")[2]))
    return rows, ""


def find_tasks(sweep: Sweep) -> tuple[dict[int, Task], str]:
    """Return the task of each point that Slurm knows, by index: one that waits or runs, else the last.

    Returns:
        The tasks, and why Slurm could not be asked, "" if it could.
    """
    jobs, noted = recorded_jobs(sweep), noted_submission(sweep)
    known = {line["job"]: (number, {*line["indices"]}) for number, line in enumerate(jobs)}
    if not jobs and noted is None:
        return {}, ""
    rows, problem = ask_queue(line["user"] for line in (*jobs, noted) if line is not None)
    ours = list[tuple[int, QueueRow]]()
    for row in rows:
        if noted is not None and row.mark == noted["mark"]:
            known.setdefault(row.job, (len(jobs), {*noted["indices"]}))
        order, indices = known.get(row.job, (0, set()))
        if row.index.isdecimal() and int(row.index) in indices:
            ours.append((order, row))
    tasks: dict[int, Task] = {}
    for _, row in sorted(ours, key=lambda pair: pair[0]):
        index = int(row.index)
        task, before = Task(f"{row.job}_{index}", row.state, row.nodes, row.reason), tasks.get(index)
        if before is None or task.waits or task.runs or not (before.waits or before.runs):
            tasks[index] = task
    return tasks, problem


def _max_array_size() -> int | None:
    """Return the number at which indices of this cluster's job arrays end; None if Slurm does not say."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    return int(found[1]) if found else None


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _words(text: str) -> str:
    """Return what a command of Slurm's says, in one line."""
    return re.sub(r"\bs(batch|queue): (error: )?", "", " ".join(text.split())) or "no reason given"
