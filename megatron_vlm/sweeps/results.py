"""Figures of every point of a sweep, and their table as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.report.run_record import RunRecord, divergence, number, read_run, recent, series, unfinite_steps
from megatron_vlm.sweeps.points import value_text
from megatron_vlm.sweeps.status import PointStatus

# Column -> what it is.
METRICS = {
    "heldout_loss_best": "lowest held-out loss",
    "heldout_loss_best_step": "step of the lowest held-out loss",
    "heldout_loss_last": "last held-out loss",
    "train_loss": "training loss at the end",  # mean over the last tenth of the logged steps
    "train_loss_best": "lowest training loss",
    "train_loss_last": "training loss of the last step",
    "grad_norm_last": "gradient norm of the last step",
    "tokens": "tokens",
    "tokens_per_second": "tokens per second",  # median over the last logged steps
    "hours": "hours in steps",
}
HIGHER_IS_BETTER = ("tokens", "tokens_per_second")


@dataclass(frozen=True)
class Result:
    """What came of a point.

    Attributes:
        status: its state.
        metrics: its figures, by the names of `METRICS`; a figure that it does not have is missing.
        losses: training loss of every logged step.
        heldout: held-out losses.
        problems: what a reader of the figures should know: losses that are not finite, damaged lines.
        diverged: whether the last loss, or the last held-out loss, is not finite.
    """

    status: PointStatus
    metrics: dict[str, float]
    losses: Sequence[tuple[int, float]]
    heldout: Sequence[tuple[int, float]]
    problems: Sequence[str] = ()
    diverged: bool = False


def read_result(status: PointStatus) -> Result:
    """Read the figures of a point from its run folder."""
    try:
        run = read_run(status.point.run_dir)
    except CheckpointError:
        run = RunRecord(status.point.run_dir)
    losses, heldout = series(run.steps, "loss"), series(run.evaluations, "loss")
    metrics: dict[str, float] = {}
    if heldout:
        best_step, best = min(heldout, key=lambda pair: pair[1])
        metrics |= {"heldout_loss_best": best, "heldout_loss_best_step": best_step, "heldout_loss_last": heldout[-1][1]}
    if losses:
        values = [value for _, value in losses]
        last = values[-max(1, len(values) // 10) :]
        metrics["train_loss"] = sum(value / len(last) for value in last)  # which no large value takes out of range
        metrics |= {"train_loss_best": min(values), "train_loss_last": values[-1]}
    if unfinite_steps(run.steps[-1:]):
        metrics |= {"train_loss": math.nan, "train_loss_last": math.nan}
    if unfinite_steps(run.evaluations[-1:]):
        metrics["heldout_loss_last"] = math.nan
    if norms := series(run.steps, "grad_norm"):
        metrics["grad_norm_last"] = norms[-1][1]
    if tokens := series(run.steps, "tokens"):
        metrics["tokens"] = sum(value for _, value in tokens)
    if (speed := recent(run.steps, "tokens_per_second")) is not None:
        metrics["tokens_per_second"] = speed
    if seconds := [(number(row, "step_seconds") or 0) * (number(row, "steps") or 1) for row in run.steps]:
        metrics["hours"] = sum(seconds) / 3600
    problems = [*_unfinite(run), *run.problems]
    return Result(status, metrics, losses, heldout, problems, bool(divergence(run)))


def _unfinite(run: RunRecord) -> Iterator[str]:
    """Say how many losses of a run are not finite."""
    for name, rows in {"loss": run.steps, "held-out loss": run.evaluations}.items():
        if steps := unfinite_steps(rows):
            yield f"the {name} is not finite at {len(steps)} of {len(rows)} logged steps, first at step {steps[0]}"


def varied_keys(results: Sequence[Result], derived: Collection[str]) -> list[str]:
    """Return the keys in which points differ, in the order of the sweep file, but for those that follow from others."""
    keys = dict.fromkeys(key for result in results for key in result.status.point.overrides if key not in derived)
    values = {key: {json.dumps(result.status.point.overrides.get(key)) for result in results} for key in keys}
    return [key for key in keys if len(values[key]) > 1]


def choose_metric(results: Sequence[Result], wanted: str | None) -> str:
    """Return the metric by which points are ranked: the one wanted, or the held-out or training loss.

    Raises:
        ConfigError: there is no such metric.
    """
    if wanted is not None:
        if wanted not in METRICS:
            raise ConfigError(f"there is no metric {wanted}", "--metric", f"give one of {', '.join(METRICS)}")
        return wanted
    return "heldout_loss_best" if any("heldout_loss_best" in result.metrics for result in results) else "train_loss"


def ranked(results: Sequence[Result], metric: str) -> list[Result]:
    """Return the results, best first; those that diverged, or have no such metric, come last."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    have = [result for result in results if is_ranked(result, metric)]
    rest = [result for result in results if not is_ranked(result, metric)]
    return sorted(have, key=lambda result: sign * result.metrics[metric]) + rest


def is_ranked(result: Result, metric: str) -> bool:
    """Return whether a point can be compared by a metric: it has it, and ended with finite losses."""
    return metric in result.metrics and not result.diverged


def csv_text(results: Sequence[Result]) -> str:
    """Return one line per point, in the order of their indices: what it is, how it went, its figures."""
    keys = list(dict.fromkeys(key for result in results for key in result.status.point.overrides))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["index", "name", "state", "step", "train_iters", *keys, *METRICS, "run_dir", "detail", "problems"])
    for result in results:
        status, point = result.status, result.status.point
        values = [value_text(point.overrides[key]) if key in point.overrides else "" for key in keys]
        figures = [result.metrics.get(name, "") for name in METRICS]
        head = [
            point.index,
            point.name,
            status.state,
            status.step,
            "" if status.train_iters is None else status.train_iters,
        ]
        writer.writerow([*head, *values, *figures, point.run_dir, status.detail, "; ".join(result.problems)])
    return stream.getvalue().encode(errors="backslashreplace").decode()
