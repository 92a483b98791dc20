"""One run owns a folder: others are refused, owners that ended are recognised, and losing the folder is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vlm.checkpoint import run_owner
from megatron_vlm.checkpoint.run_owner import OWNER_NAME, RunOwner
from megatron_vlm.errors import CheckpointError, LaunchError

ROOT = Path(__file__).parents[2]
HEARTBEAT, SILENCE = 0.05, 0.4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(run_owner, "SETTLE_SECONDS", 0.1)


def owner_of(run_dir: Path, **environment: str) -> RunOwner:
    return RunOwner(run_dir, HEARTBEAT, SILENCE, environment)


def content(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / OWNER_NAME).read_text())


def leave_owner(run_dir: Path, **changes: Any) -> None:
    """An owner of this boot and namespace whose process has ended, unless changed."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    fields = {**run_owner.describe_process(), **run_owner.describe_job({}), "token": "old", "pid": ended.pid}
    run_dir.mkdir(exist_ok=True)
    (run_dir / OWNER_NAME).write_text(json.dumps(fields | changes))


def states(run_dir: Path) -> Mapping[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in run_dir.rglob("*") if path.is_file()}


@contextmanager
def owning_process(run_dir: Path) -> Iterator[subprocess.Popen]:
    """Another process that owns the folder; it gives no sign of life."""
    program = f"""
import signal
from megatron_vlm.checkpoint.run_owner import RunOwner
with RunOwner({str(run_dir)!r}, heartbeat_seconds=600) as owner:
    owner.take()
    print("taken", flush=True)
    signal.pause()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen]]:
    run_dir = tmp_path_factory.mktemp("owned") / "run"
    with owning_process(run_dir) as process:
        yield run_dir, process


def test_a_living_owner_refuses_others_and_a_killed_one_does_not(other: tuple[Path, subprocess.Popen]) -> None:
    """At once, although the owner is stopped and gives no sign of life; the refused start changes nothing."""
    run_dir, process = other
    (run_dir / "metrics.jsonl").write_text("{}\n")
    process.send_signal(signal.SIGSTOP)
    before, began = states(run_dir), time.monotonic()
    with owner_of(run_dir) as second, pytest.raises(LaunchError) as refusal:
        second.take()
    assert time.monotonic() - began < SILENCE
    line = str(refusal.value)
    assert f"process {process.pid} on " in line and str(run_dir) in line and "--" in line
    assert states(run_dir) == before

    process.kill()
    # A zombie, as psutil calls it, until its parent reads its state: it writes nothing any more.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    with owner_of(run_dir) as third:
        third.take()
        assert content(run_dir)["pid"] == os.getpid()
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_a_new_process_with_the_number_of_the_owner_is_not_the_owner(tmp_path: Path) -> None:
    leave_owner(tmp_path, pid=os.getpid(), process_start=run_owner.describe_process()["process_start"] - 1)
    with owner_of(tmp_path) as owner:
        owner.take()
        assert content(tmp_path)["token"] != "old"


ELSEWHERE = {"host": "other", "boot": "another", "pid": 1}


@pytest.mark.parametrize(
    ("before", "environment", "at_once"),
    [
        ({"slurm_job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"slurm_job": "7", "slurm_restarts": 1}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm_job": "8"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        (
            {"slurm_job": "5_2"},
            {
                "SLURM_JOB_ID": "9",
                "SLURM_ARRAY_JOB_ID": "5",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_RESTART_COUNT": "2",
            },
            True,
        ),
        (
            {"slurm_job": "5_1"},
            {
                "SLURM_JOB_ID": "9",
                "SLURM_ARRAY_JOB_ID": "5",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_RESTART_COUNT": "2",
            },
            False,
        ),
        ({"torchrun_job": "x"}, {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({}, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({}, {}, False),
    ],
)
def test_an_owner_elsewhere_that_is_silent(
    tmp_path: Path, before: Any, environment: Any, at_once: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job takes over at once; any other start says whom it waits for and waits for the limit."""
    leave_owner(tmp_path, **ELSEWHERE, **before)
    began = time.monotonic()
    with owner_of(tmp_path, **environment) as owner:
        owner.take()
        assert ((waited := time.monotonic() - began) < SILENCE) == at_once and waited < SILENCE + 2
        assert content(tmp_path)["token"] == owner.content["token"]
    printed = capsys.readouterr().out
    assert ("watching" in printed) != at_once and "process 1 on other" in printed


def test_an_owner_elsewhere_that_lives(tmp_path: Path) -> None:
    """Its sign of life, an hour behind our clock, refuses; the file stays as it is."""
    leave_owner(tmp_path, **ELSEWHERE, slurm_job="12")
    path = tmp_path / OWNER_NAME
    text, hour_ago = path.read_text(), time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    threading.Timer(SILENCE / 2, os.utime, (path, (hour_ago + 1, hour_ago + 1))).start()
    with owner_of(tmp_path) as second, pytest.raises(LaunchError, match=r"process 1 on other \(Slurm job 12\)"):
        second.take()
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x", "host": 3}', "\0" * 40])
def test_a_damaged_file_is_an_owner_that_is_not_known(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / OWNER_NAME).write_text(text)
    with owner_of(tmp_path) as owner:
        owner.take()
        assert content(tmp_path)["pid"] == os.getpid()
    assert "watching" in capsys.readouterr().out


def test_of_two_that_take_over_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the second deletes the first one's file, which it took for the old one's."""
    leave_owner(tmp_path)
    first, second = owner_of(tmp_path), owner_of(tmp_path)
    settle, path = time.sleep, tmp_path / OWNER_NAME

    def the_second_comes_in(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", settle)
        path.unlink()
        path.write_text(json.dumps(second.content))

    monkeypatch.setattr(time, "sleep", the_second_comes_in)
    with first, pytest.raises(LaunchError, match="at the same moment"):
        first.take()
    assert content(tmp_path) == second.content


def wait_for(owner: RunOwner) -> str:
    end = time.monotonic() + 10
    while owner.lost is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return owner.lost


def test_the_heartbeat_notices_another_owner_and_a_deleted_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / OWNER_NAME
    with owner_of(path.parent) as owner:
        owner.take()
        first = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == first:
            time.sleep(0.01)
        path.unlink()  # alone, this harms nobody
        end = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        owner.confirm()
        leave_owner(path.parent, **ELSEWHERE)
        assert "taken over by process 1 on other" in wait_for(owner)
        with pytest.raises(CheckpointError, match="taken over"):
            owner.confirm()
    assert content(path.parent)["token"] == "old", "another's file was deleted"
    assert "written again" in capfd.readouterr().err

    with owner_of(tmp_path / "gone") as owner:
        owner.take()
        (tmp_path / "gone").rename(tmp_path / "moved")
        assert "deleted or moved" in wait_for(owner)
        with pytest.raises(CheckpointError, match="deleted or moved"):
            owner.confirm()


def test_an_empty_folder_is_not_left_behind(tmp_path: Path) -> None:
    with owner_of(tmp_path / "run") as owner:
        owner.take()
        assert (tmp_path / "run" / OWNER_NAME).exists()
    assert not (tmp_path / "run").exists()
