"""A sweep as a job array on a real Slurm of two nodes: what its commands say and do throughout."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_vlm.errors import ConfigError
from megatron_vlm.sweeps import slurm
from megatron_vlm.sweeps.manifest import Sweep, read_sweep
from megatron_vlm.sweeps.status import PointStatus, status_of
from tests.slurm.cluster import Cluster
from tests.training.loop_run import Place, build_place, read_lines
from tools import sweep as tool

pytestmark = pytest.mark.slurm
PATIENCE_SECONDS = 900.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def folder(cluster: Cluster, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base configuration, in which the commands run with the test's Slurm."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    base = {
        "run_dir": "unused",
        "device": "cpu",
        "model": {"hf_path": str(place.model)},
        "data": {"train": [{"path": str(place.data / "train.jsonl")}], "seq_length": 96, "num_workers": 0},
        "train": {"train_iters": 3, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"schedule": "constant"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return tmp_path


def write_sweep_file(folder: Path, /, **content: object) -> None:
    """Two points at a time, each alone on its node."""
    resources = {
        "processes_per_node": 1,
        "time": "0:20:00",
        "sbatch_options": ["--exclusive"],
        "environment": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
    }
    full = {"base": "base.yaml", "folder": "out", "concurrency": 2, "resources": resources, **content}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(full))


def wait_until(sweep: Sweep, is_so: Callable[[list[PointStatus]], bool]) -> list[PointStatus]:
    """Wait until the status of the points is so; every answer on the way is one of Slurm's."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        statuses, warning = status_of(sweep)
        assert warning == ""
        if is_so(statuses):
            return statuses
        logs = "\n".join(path.read_text() for path in (sweep.folder / "logs").iterdir())
        assert time.monotonic() < end, f"{statuses}\n{logs}"
        time.sleep(0.2)


def states(statuses: list[PointStatus]) -> list[str]:
    return [status.state for status in statuses]


def jobs_of(sweep: Sweep) -> list[dict]:
    return read_lines(sweep.folder / "jobs.jsonl")


def test_array_over_two_nodes(cluster: Cluster, place: Place, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three points of which one has a broken row: it fails with its message, and alone is tried again."""
    broken = place.data / "broken.jsonl"
    good = (place.data / "train.jsonl").read_bytes()
    broken.write_bytes(good + b"{no row}\n")
    sources = [str(place.data / "train.jsonl"), str(place.data / "text.jsonl"), str(broken)]
    write_sweep_file(folder, set={"data.strict": True}, grid={"data.train": sources}, point_name="{data.train}")

    assert tool.main(["submit", "sweep.yaml"]) == 0, capsys.readouterr().err
    sweep = read_sweep(Path("out"))
    (job,) = jobs_of(sweep)
    assert job["indices"] == [0, 1, 2]
    ran_at_once = 0
    seen: set[str] = set()

    def ended(statuses: list[PointStatus]) -> bool:
        nonlocal ran_at_once
        ran_at_once = max(ran_at_once, states(statuses).count("running"))
        seen.update(states(statuses))
        return not {"running", "pending", "waiting"} & {*states(statuses)}

    statuses = wait_until(sweep, ended)
    assert states(statuses) == ["done", "done", "failed"], statuses
    assert "broken.jsonl" in statuses[2].detail and statuses[2].detail.startswith("DataError: ")
    assert seen <= {"pending", "running", "done", "failed"} and "running" in seen
    hosts = {
        line["host"] for point in sweep.points for line in read_lines(sweep.attempts_path(point)) if "host" in line
    }
    assert ran_at_once == 2 and hosts == {*cluster.nodes}, "two at a time, each on its own node"
    assert cluster.job(f"{job['job']}_2")["Restarts"] == "0", "a mistake is not tried again"

    # Nothing but what failed is submitted again, and nothing that is done is trained again.
    done = [point.run_dir / "metrics.jsonl" for point in sweep.points[:2]]
    before = {path: path.read_bytes() for path in done}
    broken.write_bytes(good)
    assert tool.main(["retry", "out"]) == 0, capsys.readouterr().err
    assert [line["indices"] for line in jobs_of(sweep)] == [[0, 1, 2], [2]]
    assert tool.main(["retry", "out"]) == 0 and len(jobs_of(sweep)) == 2, "it waits or runs already"
    wait_until(sweep, lambda statuses: states(statuses) == ["done"] * 3)
    again = slurm.submit(sweep, sweep.points[:1], "5eed")
    rows, problem = slurm.ask_queue([os.getuid()])
    assert problem == "" and {row.job for row in rows if row.mark == "5eed"} == {again}, "found without its number"
    assert cluster.wait_for_state(f"{again}_0", "COMPLETED", "FAILED") == "COMPLETED"
    assert "point 0 is done: nothing is left to train" in sweep.log_path(sweep.points[0]).read_text()
    assert {path: path.read_bytes() for path in before} == before

    assert tool.main(["report", "out"]) == 0
    with open("out/results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, point in zip(rows, sweep.points, strict=True):
        losses = [entry["loss"] for entry in read_lines(point.run_dir / "metrics.jsonl")]
        assert row["state"] == "done" and float(row["train_loss_last"]) == losses[-1] and row["step"] == "3"
    assert _copies_of_model(place, folder / "out") == []


@pytest.mark.full
def test_a_point_that_is_preempted_goes_on_alone(cluster: Cluster, folder: Path) -> None:
    """An urgent job takes one node; the other point trains on. What is cancelled stays so until it is retried."""
    write_sweep_file(folder, set={"train.train_iters": 40}, grid={"train.seed": [1, 2]})
    assert tool.main(["submit", "sweep.yaml"]) == 0
    sweep = read_sweep(Path("out"))
    (job,) = jobs_of(sweep)
    wait_until(sweep, lambda statuses: all(status.step > 2 for status in statuses))
    urgent = cluster.submit(folder, "--partition=urgent", "--nodes=1", "--exclusive", "--wrap=sleep 1")
    statuses = wait_until(sweep, lambda statuses: "waiting" in states(statuses))
    preempted = states(statuses).index("waiting")
    assert "signal SIGTERM; job " in statuses[preempted].detail and 2 < statuses[preempted].step < 40
    assert cluster.wait_for_state(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    cluster.run_again_now(f"{job['job']}_{preempted}")
    wait_until(sweep, lambda statuses: states(statuses)[preempted] == "running")
    cluster.command("scancel", f"{job['job']}_{preempted}")
    wait_until(sweep, lambda statuses: set(states(statuses)) == {"done", "stopped"} or "failed" in states(statuses))
    assert cluster.job(f"{job['job']}_{preempted}")["JobState"] == "CANCELLED"
    assert tool.main(["retry", "sweep.yaml"]) == 0
    assert jobs_of(sweep)[1]["indices"] == [preempted]
    wait_until(sweep, lambda statuses: states(statuses) == ["done", "done"])
    assert len(read_lines(sweep.points[preempted].run_dir / "metrics.jsonl")) >= 40


def test_what_slurm_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own test, before anything is submitted."""
    for resources, words in (
        ({"partition": "nowhere"}, "Invalid partition name specified [--job-name=out"),
        ({"nodes": 3, "processes_per_node": 1}, "Requested node configuration is not available"),
    ):
        write_sweep_file(folder, grid={"train.global_batch_size": [6, 12]}, resources=resources)
        for command in ("check", "submit"):
            assert tool.main([command, "sweep.yaml"]) == 2
            said = capsys.readouterr().err
            assert said.startswith("ConfigError: Slurm refuses the job: ") and words in said, said
            assert len(said.splitlines()) == 1
    assert not (folder / "out/jobs.jsonl").exists()
    write_sweep_file(folder, grid={"train.seed": [1]})
    assert tool.main(["make", "sweep.yaml"]) == 0
    sweep = read_sweep(Path("out"))
    assert "to start at" in slurm.check_with_slurm(sweep, sweep.points)
    last = dataclasses.replace(sweep.points[0], index=1999)  # MaxArraySize is 2000
    assert "to start at" in slurm.check_with_slurm(sweep, [last])
    with pytest.raises(ConfigError, match="has a point 2000, and tasks of job arrays end at 1999 here"):
        slurm.check_with_slurm(sweep, [dataclasses.replace(last, index=2000)])


@pytest.mark.full
def test_a_point_that_is_cancelled_while_it_starts(cluster: Cluster, folder: Path) -> None:
    """Its output is where the sweep reads it, also in a folder whose name looks like a pattern of sbatch's."""
    write_sweep_file(folder, set={"train.train_iters": 2000}, grid={"train.seed": [1]}, folder="50%j")
    assert tool.main(["submit", "sweep.yaml"]) == 0
    sweep = read_sweep(Path("50%j"))
    (job,) = jobs_of(sweep)
    wait_until(sweep, lambda statuses: sweep.attempts_path(sweep.points[0]).is_file())
    cluster.command("scancel", job["job"])
    (status,) = wait_until(sweep, lambda statuses: states(statuses) != ["running"] and not statuses[0].has_job)
    assert status.state == "stopped", status
    assert "== start of point 0" in sweep.log_path(sweep.points[0]).read_text()


def _copies_of_model(place: Place, folder: Path) -> list[Path]:
    """Files below a folder that have the content of one of the model's."""
    of_model = {hashlib.sha256(path.read_bytes()).digest() for path in place.model.iterdir() if path.is_file()}
    return [
        path for path in folder.rglob("*") if path.is_file() and hashlib.sha256(path.read_bytes()).digest() in of_model
    ]


def test_a_copy_would_be_seen(place: Place, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((place.model / "config.json").read_text())))
    assert _copies_of_model(place, tmp_path) == []
    (tmp_path / "copy.json").write_bytes((place.model / "config.json").read_bytes())
    assert _copies_of_model(place, tmp_path) == [tmp_path / "copy.json"]
