"""`scripts/train.sbatch` on a real Slurm of two nodes: what ends a job, and what it does then."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import Job
from tests.training.loop_run import ROOT, Place, build_place, start_torchrun

pytestmark = pytest.mark.slurm
STEPS = 60
LONG = (f"train.train_iters={STEPS}", "train.precision=bf16", "optimizer.lr=1e-4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def ranks_of(job: Job) -> list[psutil.Process]:
    """Processes of a job that train."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if (
            "pretrain_vlm.py" in command
            and f"--run_dir={job.run_dir}" in command
            and not {"torch.distributed.run", "--print_config"}.intersection(command)
        ):
            found.append(process)
    return found


def has_checkpoints(job: Job, count: int) -> bool:
    return len(list((job.run_dir / "checkpoints").glob("step_????????"))) >= count


def test_preempted_job_goes_on_bit_for_bit(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    """It makes room for a more urgent one, requeues itself, and ends with the losses of an uninterrupted run."""
    job = Job.submit(cluster, place, tmp_path / "preempted", *LONG)
    job.wait_until(lambda: len(job.metrics) > 3, "step")
    urgent = cluster.submit(tmp_path, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    job.wait_for_state("PENDING")
    stopped = job.stopped()
    assert stopped is not None and stopped["reason"] == "signal SIGTERM" and 3 < stopped["step"] < STEPS, job.printed()
    assert cluster.wait_for_state(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    cluster.run_again_now(job.number)
    assert job.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.printed()
    assert job.restarts == 1 and job.stopped() is None
    assert f"resuming after step {stopped['step']} of {STEPS}" in job.printed()

    log = tmp_path / "torchrun.log"
    arguments = place.arguments(tmp_path / "whole", "parallel.tensor_model_parallel_size=2", *LONG)
    assert start_torchrun(arguments, log).wait(240) == 0, log.read_text()
    whole = Job(cluster, job.number, tmp_path / "whole", log)
    assert job.losses == whole.losses and len(whole.losses) == STEPS


@pytest.mark.full
def test_time_limit_saves_and_goes_on(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    """Slurm's warning before the limit, which it may send up to a minute too early."""
    steps = 500  # longer than the limit
    settings = (*LONG, f"train.train_iters={steps}")
    job = Job.submit(cluster, place, tmp_path / "run", *settings, options=("--time=2", "--signal=USR1@60"))
    while job.wait_for_end() == "PENDING":
        assert job.restarts < 20, job.printed()
        cluster.run_again_now(job.number)
    assert job.restarts > 0 and job.state == "COMPLETED" and len(job.losses) == steps, job.printed()


@pytest.mark.full
def test_cancelled_job_stays_cancelled(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    """It still saves."""
    job = Job.submit(cluster, place, tmp_path / "run", *LONG)
    job.wait_until(lambda: len(job.metrics) > 3, "step")
    cluster.command("scancel", job.number)
    job.wait_until(lambda: "was cancelled" in job.printed(), "end")
    assert job.wait_for_end() == "CANCELLED"
    assert job.stopped() is not None and job.restarts == 0, job.printed()


@pytest.mark.full
def test_crashed_job_is_retried_but_not_for_ever(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    """A killed rank; a job that crashes before every checkpoint ends after MAX_CRASHES."""
    settings = (*LONG, "checkpoint.save_interval=2")
    job = Job.submit(cluster, place, tmp_path / "run", *settings, MAX_CRASHES="2")
    for crash in (1, 2):
        job.wait_until(partial(has_checkpoints, job, crash), "checkpoint")
        ranks_of(job)[0].kill()
        assert job.wait_for_end() == "PENDING", job.printed()
        cluster.run_again_now(job.number)
    state = "RUNNING"
    while state != "FAILED":  # from here on without a new checkpoint
        assert job.restarts < 5, job.printed()
        job.wait_until(lambda: bool(ranks_of(job)), "rank")
        for process in ranks_of(job):
            process.kill()
        if (state := job.wait_for_end()) == "PENDING":
            cluster.run_again_now(job.number)
    assert "times without a new checkpoint" in job.printed()


@pytest.mark.full
def test_job_goes_on_after_the_loss_of_a_node(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    job = Job.submit(cluster, place, tmp_path / "run", *LONG, "checkpoint.save_interval=5")
    job.wait_until(partial(has_checkpoints, job, 1), "checkpoint")
    cluster.command("scontrol", "update", f"nodename={cluster.nodes[1]}", "state=down", "reason=test")
    assert job.wait_for_end() == "PENDING", job.printed()
    cluster.bring_back(cluster.nodes[1])
    cluster.run_again_now(job.number)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert "resuming after step" in job.printed() and len(job.losses) == STEPS
    assert not ranks_of(job)


@pytest.mark.full
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", "optimizer.lr cannot be 'fast'"),
        ("parallel.tensor_model_parallel_size=4", "2 ranks are not a multiple of 4"),
        ("data.train=[{path: /missing.jsonl}]", "/missing.jsonl does not exist"),
    ],
    ids=["configuration", "launch", "data"],
)
def test_a_mistake_is_said_once_and_not_retried(
    cluster: Cluster, place: Place, tmp_path: Path, override: str, message: str
) -> None:
    job = Job.submit(cluster, place, tmp_path / "run", override)
    assert job.wait_for_end() == "FAILED" and job.restarts == 0, job.printed()
    assert cluster.job(job.number)["ExitCode"] == "2:0" and message in job.printed(), job.printed()


def test_srun_starts_ranks_without_torchrun(cluster: Cluster, place: Place, tmp_path: Path) -> None:
    """Two tasks on each of two nodes, dealt out in turn; and one process in an allocation is one rank."""
    settings = place.arguments(tmp_path / "run", "parallel.tensor_model_parallel_size=2", "train.train_iters=2")
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    train = [sys.executable, "pretrain_vlm.py"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", "--distribution=cyclic", "--kill-on-bad-exit=1"]
    done = subprocess.run(
        [*srun, *train, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x CPU on 2 nodes" in done.stdout
    assert re.search(r"ranks by node: \S+ 0-1, \S+ 2-3\n.*tensor +2 groups of +2 ranks, inside a node\n", done.stdout)
    assert re.search(r"data +2 groups of +2 ranks, over 2 nodes\n", done.stdout)
    # A mistake that every rank finds, before there is a process group.
    wrong = subprocess.run(
        [*srun, *train, *settings, "--optimizer.lr=fast"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # srun exits with the largest code, which is that of the ranks that it ended.
    assert wrong.returncode and wrong.stderr.count("optimizer.lr cannot be 'fast'") == 1, wrong.stderr
    alone = ["salloc", "--nodes=2", "--ntasks=4", *train, *place.arguments(tmp_path / "alone", "train.train_iters=1")]
    done = subprocess.run(alone, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 x CPU on 1 node" in done.stdout, done.stdout + done.stderr
