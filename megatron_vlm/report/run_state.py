"""How a run is doing, from what its folder says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.checkpoint.run_owner import find_owner
from megatron_vlm.report.run_record import RunRecord, divergence

State = Literal["running", "finished", "failed", "stopped", "killed", "diverged", "ended"]


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        word: running, finished, failed (refused with a message), stopped (on request: a signal,
            `train.exit_interval`), killed (its process is gone, its folder was not given back), diverged (its loss was
            not finite at the end), or ended (before its last step, without a message in its folder).
        detail: more about it, "" if there is none.
    """

    word: State
    detail: str = ""


def state_of(run: RunRecord) -> RunState:
    """Return the state of a run, now."""
    owner, total = find_owner(run.run_dir), run.train_iters
    if owner is not None and owner.lives:
        return RunState("running", owner.name)
    if run.user_error:
        return RunState("failed", run.user_error)
    saved = run.checkpoints[-1] if run.checkpoints else 0
    # Checkpoints of a finished run may have been deleted since; the last step of a killed one may not be saved.
    if total is not None and (saved >= total or (owner is None and run.last_step >= total)):
        return RunState("finished")
    if run.stopped:
        return RunState("stopped", str(run.stopped.get("reason", "no reason given")))
    if owner is not None:
        return RunState("killed", f"{owner.name} is gone")
    diverged = divergence(run)
    return RunState("diverged", diverged) if diverged else RunState("ended")
