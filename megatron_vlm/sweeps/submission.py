"""Submits points to Slurm once: by one command at a time, and noted before sbatch runs.

sbatch may have submitted a job of which it could not tell: it was interrupted, or Slurm answered too late. The note
FOLDER/submitting.json has the mark that is the last argument of the job's script; squeue shows it. The note goes once
the job's number is known, or Slurm knows no such job.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.errors import CheckpointError, LaunchError
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.sweeps import slurm
from megatron_vlm.sweeps.manifest import NOTE_NAME, Sweep, noted_submission, record_job
from megatron_vlm.sweeps.points import Point


@contextmanager
def sole_submission(sweep: Sweep) -> Iterator[None]:
    """Context in which nobody else submits points of a sweep; an earlier submission is cleared up first.

    Raises:
        LaunchError: another command submits points now, or Slurm does not say what became of an earlier one.
        CheckpointError: the sweep's folder cannot be written.
    """
    with RunOwner(sweep.folder) as owner:
        try:
            owner.take()
        except LaunchError as error:
            what = error.what.replace("run_dir", "the sweep's folder")
            raise LaunchError(what, str(sweep.folder), "submit again when that submission has ended") from None
        except OSError as error:
            what = f"the sweep's folder cannot be written: {error.strerror or error}"
            raise CheckpointError(what, str(sweep.folder), "submit as somebody who may write there") from None
        _clear_up(sweep)
        yield


def submit_once(sweep: Sweep, points: Sequence[Point]) -> str:
    """Submit points as one job array within `sole_submission`, and note it; returns the job's number.

    Raises:
        ConfigError: Slurm refuses the job.
        LaunchError: sbatch failed, or it is not known whether it did.
    """
    slurm.check_with_slurm(sweep, points)
    note, mark = sweep.folder / NOTE_NAME, secrets.token_hex(8)
    indices = [point.index for point in points]
    replace_durably(note, json.dumps({"mark": mark, "user": os.getuid(), "indices": indices}))
    try:
        job = slurm.submit(sweep, points, mark)
    except slurm.UnknownOutcomeError:
        raise
    except LaunchError:
        note.unlink()
        raise
    record_job(sweep, job, indices)
    note.unlink()
    return job


def _clear_up(sweep: Sweep) -> None:
    """Note the job of a submission that was cut off, if Slurm has it."""
    noted = noted_submission(sweep)
    if noted is None:
        return
    rows, problem = slurm.ask_queue([noted["user"]])
    if problem:
        what = f"an earlier submission was cut off, and Slurm does not say whether it has the job: {problem}"
        raise LaunchError(what, str(sweep.folder), "submit again when Slurm answers")
    job = next((row.job for row in rows if row.mark == noted["mark"]), None)
    if job is not None:
        record_job(sweep, job, noted["indices"], noted["user"])
        print(f"an earlier submission was cut off; Slurm has it as job {job}")
    (sweep.folder / NOTE_NAME).unlink()
