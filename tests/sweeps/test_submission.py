"""Points are submitted once, whatever becomes of a submission. Programs of the test's stand for Slurm's.

What real ones say and do is in tests/slurm.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.run_owner import OWNER_NAME, describe_process
from megatron_vlm.errors import ConfigError
from megatron_vlm.sweeps import slurm
from megatron_vlm.sweeps.manifest import NOTE_NAME, Sweep, read_lines, recorded_jobs
from megatron_vlm.sweeps.sweep_file import read_sweep_file
from tests.sweeps.sweep_files import Files
from tools import sweep as tool

# Keeps jobs as the controller does; `before` and `after` run before and after it has taken one.
SBATCH = """#!/bin/sh
for option; do mark=$option; done
[ "$1" = --test-only ] && exit 0
echo "$*" >>{folder}/submitted
number=$(wc -l <{folder}/submitted)
{before}
for index in 0 1 2; do echo "$number|$index|PENDING||Priority|sweep.sbatch folder python $mark" >>{folder}/queue; done
{after}
echo "$number"
"""


class FakeSlurm:
    """Folder with sbatch, squeue and scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "queue").touch()
        (folder / "submitted").touch()
        self.sbatch()
        self.program("squeue", f"#!/bin/sh\necho $* >>{folder}/asked\ncat {folder}/queue\n")
        self.program("scontrol", "#!/bin/sh\necho 'MaxArraySize            = 1001'\n")

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def sbatch(self, before: str = "", after: str = "") -> None:
        self.program("sbatch", SBATCH.format(folder=self.folder, before=before, after=after))

    def squeue_fails(self) -> None:
        self.program("squeue", "#!/bin/sh\necho 'slurm_load_jobs error: Socket timed out' >&2; exit 1\n")

    @property
    def submitted(self) -> int:
        return len((self.folder / "submitted").read_text().splitlines())


@pytest.fixture
def fake(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def sweep(files: Files, fake: FakeSlurm) -> Sweep:
    return files.make()


def test_submitted_once(sweep: Sweep, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["submit", "sweep.yaml"]) == 0
    assert "submitted job 1: points 0-2" in capsys.readouterr().out
    for command in ("submit", "retry"):
        assert tool.main([command, "out"]) == 0 and fake.submitted == 1
    assert [(line["job"], line["indices"]) for line in recorded_jobs(sweep)] == [("1", [0, 1, 2])]
    assert not (sweep.folder / NOTE_NAME).exists() and not (sweep.folder / OWNER_NAME).exists()


def test_nothing_is_submitted_while_slurm_does_not_answer(
    sweep: Sweep, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["submit", "out"]) == 0
    fake.squeue_fails()
    for command in ("submit", "retry"):
        capsys.readouterr()
        assert tool.main([command, "out"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("LaunchError: Slurm does not say which points it has already: squeue failed:"), said
    assert fake.submitted == 1
    assert tool.main(["status", "out"]) == 0, "which only warns"


@pytest.mark.parametrize("taken", [True, False])
def test_sbatch_that_cannot_tell(
    sweep: Sweep, fake: FakeSlurm, taken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The controller has taken the job, or not, when its answer comes too late; the next command finds out."""
    late = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    fake.sbatch(**{"after" if taken else "before": late})
    assert tool.main(["submit", "out"]) == 2
    assert "sbatch may have submitted the job or not: Batch job submission failed" in capsys.readouterr().err
    assert tool.main(["status", "out"]) == 0
    assert ("job 1_0 waits" in capsys.readouterr().out) == taken
    fake.sbatch()
    assert tool.main(["submit", "out"]) == 0
    assert fake.submitted == (1 if taken else 2)
    assert [line["job"] for line in recorded_jobs(sweep)] == ["1" if taken else "2"]
    assert ("Slurm has it as job 1" in capsys.readouterr().out) == taken


def test_an_interruption_while_sbatch_runs(sweep: Sweep, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C after the controller has taken the job, before its number is known."""
    fake.sbatch(after="exec sleep 60")

    def interrupt() -> None:
        while len((fake.folder / "queue").read_text().splitlines()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert tool.main(["submit", "out"]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert "sbatch may have submitted the job or not: interrupted" in capsys.readouterr().err
    assert (sweep.folder / NOTE_NAME).exists() and sweep.has_begun
    assert tool.main(["submit", "out"]) == 0 and fake.submitted == 1
    assert [line["job"] for line in recorded_jobs(sweep)] == ["1"]


def test_a_refusal_leaves_no_note(sweep: Sweep, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    fake.sbatch(before="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    assert tool.main(["submit", "out"]) == 2
    assert "sbatch failed: QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert not (sweep.folder / NOTE_NAME).exists() and not sweep.has_begun


def test_one_submission_at_a_time(sweep: Sweep, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep.folder / OWNER_NAME).write_text(json.dumps({**describe_process(), "token": "another"}))
    assert tool.main(["submit", "out"]) == 2 and fake.submitted == 0
    assert f"the sweep's folder is used by process {os.getpid()}" in capsys.readouterr().err
    (sweep.folder / OWNER_NAME).unlink()
    fake.sbatch(before="sleep 1")
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(tool.main(["submit", "out"]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.submitted == 1 and sorted(codes) == [0, 2]


def test_jobs_of_others_are_asked_for(sweep: Sweep, fake: FakeSlurm) -> None:
    """Of everybody who submitted points; lines that no command of ours wrote say nothing."""
    (fake.folder / "queue").write_text("5|1|RUNNING|n1|None|sweep.sbatch out python\n")
    rows = [{"job": "5", "user": 4711, "indices": [1]}, {"job": "6"}, {"job": 7, "indices": 3}, {"indices": [1]}]
    (sweep.folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[]\n7\n")
    tasks, problem = slurm.find_tasks(sweep)
    assert problem == "" and {index: task.state for index, task in tasks.items()} == {1: "RUNNING"}
    assert "--user=4711 " in (fake.folder / "asked").read_text()
    assert len(read_lines(sweep.folder / "jobs.jsonl")) == 4


def test_more_points_than_an_array_has(files: Files, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    fake.program("scontrol", "#!/bin/sh\necho 'MaxArraySize            = 3'\n")
    files.write(grid={"train.seed": [*range(4)]})
    for command in ("check", "submit"):
        assert tool.main([command, "sweep.yaml"]) == 2
        said = capsys.readouterr().err
        assert "the sweep has a point 3, and tasks of job arrays end at 2 here (Slurm's MaxArraySize)" in said
        assert "divide it into sweeps of at most 3 points" in said
    assert fake.submitted == 0
    files.write(grid={"train.seed": [*range(3)]})
    assert tool.main(["submit", "sweep.yaml"]) == 0


@pytest.mark.parametrize(
    "option, fix",
    [
        ("--array=0-5", "leave it out"),
        ("--arr=0-5", "leave it out"),
        ("-a0-5", "leave it out"),
        ("--partition=long", "set resources.partition"),
        ("-N 2", "set resources.nodes"),
        ("--export=NONE", "set resources.environment"),
        ("job.sh", "write options with their values"),
    ],
)
def test_options_that_the_sweep_sets(files: Files, option: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(files.write(resources={"sbatch_options": [option]}))
    assert repr(option) in str(caught.value) and fix in str(caught.value)
    allowed = ["--gpus=2", "--gres=gpu:2", "--exclusive", "--time-min=10", "-C h200", "--comment=mine", "--nodelist=n1"]
    assert read_sweep_file(files.write(resources={"sbatch_options": allowed}))[0].resources.sbatch_options == allowed


def test_a_folder_with_a_percent_sign(files: Files, fake: FakeSlurm) -> None:
    sweep = files.make(folder="50%j")
    (output,) = [each for each in slurm.sbatch_command(sweep, sweep.points) if each.startswith("--output=")]
    assert output == f"--output={files.folder}/50%%j/logs/%4a.out"
