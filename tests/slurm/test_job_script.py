"""What `scripts/train.sbatch` decides, with stand-ins for Slurm's commands and for training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.loop_run import ROOT

COMMANDS = {
    # The command behind srun's options, in the place of its nodes.
    "srun": '[ -z "$SIGNALLED" ] || kill -TERM $(ps -o sid= -p $$); while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": """
        case "$1 $2" in
          "show job") [ -z "$SLURM_IS_DOWN" ] || exit 1; echo "JobId=7 JobState=$STATE Restarts=0" ;;
          "show hostnames") echo localhost ;;
          requeue*) echo "$2" >>"$REQUEUED" ;;
        esac""",
    "sleep": "exit 0",
    "wrapper": 'echo "Starting a container"; "$@"; code=$?; echo "Report: x"; exit $code',
    "python": f"""
        [[ "$1" != -c ]] || exec {sys.executable} "$@"
        case "$*" in
          *--print_config*) [ -z "$MISTAKE" ] || {{ echo "$MISTAKE" >&2; exit 2; }}; echo "run_dir: $RUN_DIR" ;;
          *) [ -z "$STOPPED" ] || echo '{{"reason": "signal SIGUSR1"}}' >"$RUN_DIR/stopped.json"; exit "$CODE" ;;
        esac""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The stand-ins; the variables say what happens in them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}
    scenario = {"RUN_DIR": f"{tmp_path}/a run", "STATE": "RUNNING", "CODE": "0", "REQUEUED": f"{tmp_path}/requeued"}
    empty = dict.fromkeys(("SLURM_IS_DOWN", "MISTAKE", "STOPPED", "SIGNALLED"), "")
    tools = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "RANKS_PER_NODE": "1"}
    return {**os.environ, **slurm, **scenario, **empty, **tools, "SLURM_SUBMIT_DIR": str(ROOT)}


def run(environment: dict[str, str], **scenario: str) -> tuple[int, str, bool]:
    """Return the script's exit code, what it prints, and whether the job was requeued."""
    requeued = Path(environment["REQUEUED"])
    requeued.unlink(missing_ok=True)
    script = [str(ROOT / "scripts" / "train.sbatch"), "--config", "some file.yaml"]
    done = subprocess.run(
        script,
        env={**environment, **scenario},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    return done.returncode, done.stdout, requeued.exists()


@pytest.mark.parametrize("run_in", ["", "wrapper"], ids=["plain", "in a container that talks"])
def test_a_stopped_run_is_requeued(environment: dict[str, str], run_in: str) -> None:
    code, printed, requeued = run(environment, STOPPED="1", RUN_IN=run_in)
    assert (code, requeued) == (0, True) and "job 7 stopped early: requeued" in printed
    assert run(environment, RUN_IN=run_in)[::2] == (0, True)  # what stopped.json says still holds
    (Path(environment["RUN_DIR"]) / "stopped.json").unlink()
    assert run(environment, RUN_IN=run_in)[::2] == (0, False)


def test_crashes_are_counted(environment: dict[str, str]) -> None:
    requeues = [run(environment, CODE="1", MAX_CRASHES="2")[2] for _ in range(2)]
    assert requeues == [True, False]
    code, printed, requeued = run(environment, CODE="1", MAX_CRASHES="many")
    assert (code, requeued) == (2, False) and "MAX_CRASHES is 'many': give a number" in printed


def test_mistakes_end_the_job(environment: dict[str, str], tmp_path: Path) -> None:
    code, printed, requeued = run(environment, MISTAKE="ConfigError: no such key", RUN_IN="wrapper")
    assert (code, requeued) == (2, False) and "ConfigError: no such key" in printed
    code, printed, requeued = run(environment, RUN_DIR="null")
    assert (code, requeued) == (2, False) and "run_dir is not set" in printed
    code, printed, requeued = run(environment, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (code, requeued) == (2, False) and "is no checkout" in printed


@pytest.mark.parametrize(
    ("scenario", "message"),
    [({"STATE": "CANCELLED"}, "was cancelled"), ({"SLURM_IS_DOWN": "1"}, "Slurm does not answer; submit it again")],
)
def test_what_is_not_requeued(environment: dict[str, str], scenario: dict[str, str], message: str) -> None:
    """In a job that Slurm cannot be asked about, a stopped run must not look complete."""
    code, printed, requeued = run(environment, STOPPED="1", **scenario)
    assert message in printed and not requeued and code == ("SLURM_IS_DOWN" in scenario)


def test_a_signal_before_training(environment: dict[str, str]) -> None:
    """Of preemption, the job is requeued; of scancel, it is not."""
    code, printed, requeued = run(environment, SIGNALLED="1")
    assert (code, requeued) == (0, True) and "stopped before training: requeued" in printed
    code, printed, requeued = run(environment, SIGNALLED="1", STATE="CANCELLED")
    assert not requeued and "was cancelled" in printed


def test_node_script_says_what_is_missing(environment: dict[str, str]) -> None:
    script = str(ROOT / "scripts" / "torchrun_node.sh")
    for missing, message in (
        ({"RANKS_PER_NODE": ""}, "set RANKS_PER_NODE"),
        ({"NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
    ):
        done = subprocess.run([script], env={**environment, **missing}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr, done
