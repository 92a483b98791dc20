"""Points that train on this machine: how many at once, what is skipped, stops, devices. A short script trains here."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlm.errors import LaunchError
from megatron_vlm.sweeps.local_run import LocalRunner, devices_of_slots, training_command
from megatron_vlm.sweeps.manifest import Sweep, begin_attempt, read_lines
from megatron_vlm.sweeps.points import Point
from megatron_vlm.sweeps.status import point_status
from tests.sweeps.sweep_files import Files

# Behaves as a run to the outside: takes the folder, saves and exits with 0 on SIGTERM, or finishes.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_vlm.checkpoint.run_owner import RunOwner
run_dir, seconds, code = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
with RunOwner(run_dir) as owner:
    owner.take()
    print("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped:
        time.sleep(0.02)
    (run_dir / "config.yaml").write_text("train: {train_iters: 4}")
    (run_dir / "stopped.json").unlink(missing_ok=True)
    if stopped:
        (run_dir / "stopped.json").write_text(json.dumps({"reason": "signal SIGTERM", "step": 1}))
    elif code:
        print("RuntimeError: it broke", file=sys.stderr)
    else:
        (run_dir / "checkpoints" / "step_00000004").mkdir(parents=True)
sys.exit(0 if stopped else code)
"""


def trainer(seconds: float = 0.1, broken: tuple[int, ...] = ()) -> object:
    def command(sweep: Sweep, point: Point) -> list[str]:
        code = "1" if point.index in broken else "0"
        return [training_command(sweep, point)[0], "-c", TRAINER, str(point.run_dir), str(seconds), code]

    return command


@pytest.fixture
def sweep(files: Files) -> Sweep:
    return files.make(grid={"train.seed": [*range(5)]})


def states(sweep: Sweep) -> list[str]:
    return [point_status(sweep, point).state for point in sweep.points]


def spans(sweep: Sweep) -> list[tuple[float, float]]:
    """Begin and end of every start."""
    lines = [read_lines(sweep.attempts_path(point)) for point in sweep.points]
    return [(begin["time"], end["time"]) for each in lines for begin, end in zip(each[::2], each[1::2], strict=True)]


@pytest.mark.parametrize("at_once", [1, 2])
def test_so_many_at_once(sweep: Sweep, at_once: int) -> None:
    said: list[str] = []
    assert LocalRunner(sweep, at_once, said.append, trainer(0.3)).run(sweep.points)
    assert states(sweep) == ["done"] * 5
    found = spans(sweep)
    assert len(found) == 5
    at_a_time = [sum(begin <= moment < end for begin, end in found) for moment, _ in found]
    assert max(at_a_time) == at_once
    assert sum("done after" in line for line in said) == 5


def test_a_point_that_fails_does_not_end_the_sweep(sweep: Sweep) -> None:
    assert not LocalRunner(sweep, 2, print, trainer(broken=(1, 3))).run(sweep.points)
    assert states(sweep) == ["done", "failed", "done", "failed", "done"]
    assert point_status(sweep, sweep.points[1]).detail == "RuntimeError: it broke"
    said: list[str] = []
    assert LocalRunner(sweep, 2, said.append, trainer()).run(sweep.points)
    assert sum("done already" in line for line in said) == 3 and states(sweep) == ["done"] * 5
    log = sweep.log_path(sweep.points[1]).read_text()
    assert log.count("== start of point 1 (seed=1)") == 2 and "RuntimeError: it broke" in log


def test_what_trains_already_is_left_alone(sweep: Sweep) -> None:
    """By another runner of this machine: here, this process."""
    me = psutil.Process()
    begin_attempt(sweep, sweep.points[1], {"id": "other", "pid": me.pid, "process_start": me.create_time()})
    said: list[str] = []
    assert not LocalRunner(sweep, 2, said.append, trainer()).run(sweep.points)
    assert states(sweep) == ["done", "running", "done", "done", "done"]
    assert any("running already" in line for line in said)
    assert len(read_lines(sweep.attempts_path(sweep.points[1]))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_lets_points_save(sweep: Sweep, number: signal.Signals) -> None:
    """One signal: what trains stops, nothing else starts. The next run goes on with all."""
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = signal.getsignal(number)
    timer.start()
    begin = time.monotonic()
    assert not LocalRunner(sweep, 2, print, trainer(60)).run(sweep.points)
    assert time.monotonic() - begin < 30
    assert states(sweep) == ["stopped", "stopped", "pending", "pending", "pending"]
    assert point_status(sweep, sweep.points[0]).detail == "signal SIGTERM"
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, ignored)
    assert LocalRunner(sweep, 2, print, trainer()).run(sweep.points)


def test_a_second_signal_ends_points_that_have_not_begun(sweep: Sweep) -> None:
    """Before they own their folders they would not hear a first one, which waits until they do."""

    def deaf(sweep: Sweep, point: Point) -> list[str]:
        return [training_command(sweep, point)[0], "-c", "import time; time.sleep(60)"]

    for seconds in (0.5, 1.0):
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    assert not LocalRunner(sweep, 1, print, deaf).run(sweep.points)
    assert time.monotonic() - begin < 30
    assert point_status(sweep, sweep.points[0]).detail == "ended by SIGKILL"


def test_the_environment_of_resources(files: Files) -> None:
    """As a job has it; of settings that only a job's script reads a line says that they are not used."""
    environment = {"POINTS_OWN": "yes", "MAX_CRASHES": "5", "CUDA_VISIBLE_DEVICES": "6,7"}
    resources = {"environment": environment, "gpus_per_node": 1}
    sweep = files.make(grid={"train.seed": [1]}, resources=resources)

    def command(sweep: Sweep, point: Point) -> list[str]:
        return [training_command(sweep, point)[0], "-c", "import os; print(dict(os.environ))"]

    said: list[str] = []
    LocalRunner(sweep, 1, said.append, command).run(sweep.points)
    log = sweep.log_path(sweep.points[0]).read_text()
    assert "'POINTS_OWN': 'yes'" in log and "'CUDA_VISIBLE_DEVICES': '6'" in log
    assert said[0] == "not used here, as settings of Slurm jobs: resources.environment MAX_CRASHES"


def test_devices(files: Files) -> None:
    assert devices_of_slots(2, None, {"CUDA_VISIBLE_DEVICES": "0"}) == [{}, {}]
    given = {"CUDA_VISIBLE_DEVICES": "4,5,GPU-ab,7"}
    assert devices_of_slots(2, 2, given) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab,7"}]
    with pytest.raises(LaunchError, match="2 points of 3 GPUs at a time, and this machine has 4"):
        devices_of_slots(2, 3, given)
    sweep = files.make(resources={"nodes": 2})
    with pytest.raises(LaunchError, match="cannot train points of several nodes"):
        LocalRunner(sweep, 1)


def test_commands(files: Files) -> None:
    sweep = files.make()
    single = training_command(sweep, sweep.points[2])
    assert single[1:] == [str(Path(single[1])), "--config", str(sweep.folder / "points/0002.yaml")]
    assert Path(single[1]).name == "pretrain_vlm.py"
    sweep = files.make(resources={"processes_per_node": 2}, folder="two")
    command = training_command(sweep, sweep.points[0])
    assert command[1:3] == ["-m", "torch.distributed.run"] and "--nproc-per-node=2" in command
    assert json.dumps(command).index("--standalone") < json.dumps(command).index("pretrain_vlm.py")
