"""Writes a run as one HTML file: headline figures, curves, data sources, starts, settings.

It works for any run folder: finished, running, stopped and resumed, with and without evaluations, or empty so far.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megatron_vlm.config import changed_settings
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.report import page
from megatron_vlm.report.chart import line_chart
from megatron_vlm.report.page import Figure, Rows, Sample
from megatron_vlm.report.run_record import (
    Record,
    RunRecord,
    divergence,
    number,
    read_run,
    recent,
    section,
    series,
    unfinite_steps,
)
from megatron_vlm.report.run_state import state_of

REPORT_NAME = "report.html"
_POINTS_PER_SMOOTHED = 40
_MAX_SOURCE_CHARTS = 9
# Heading -> key in metrics.jsonl, factor, and whether the axis may be logarithmic; what is nowhere but 0 is left out.
_STEP_CHARTS = {
    "Gradient norm": ("grad_norm", 1.0, True),
    "Learning rate": ("lr", 1.0, False),
    "Tokens per second": ("tokens_per_second", 1.0, False),
    "Images per second": ("images_per_second", 1.0, False),
    "Seconds per step": ("step_seconds", 1.0, True),
    "Waiting for data, % of a step": ("data_wait_share", 100.0, False),
    "Model FLOPs utilisation, %": ("mfu", 100.0, False),
    "Padding, % of a batch": ("padding_share", 100.0, False),
    "Work of the busiest data rank over the mean, predicted": ("straggler_ratio_predicted", 1.0, False),
    "Peak memory of a rank, GiB": ("peak_memory_bytes", 2.0**-30, False),
}
_EXPERT_CHARTS = {
    "Tokens of the busiest expert over the mean": ("expert_imbalance", 1.0, False),
    "Experts without tokens, worst layer": ("dead_experts", 1.0, False),
    "Load-balancing loss": ("load_balancing_loss", 1.0, False),
}
_COUNTED_ROWS = {
    "bad_rows": "rows that cannot be used",
    "too_long_rows": "rows longer than data.seq_length",
    "empty_answers": "answers without words",
}
_LAYOUT_WORDS = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "virtual_pipeline_model_parallel_size": "virtual",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
    "expert_tensor_parallel_size": "expert tensor",
}


def write_report(
    run_dir: Path,
    path: Path | None = None,
    *,
    title: str | None = None,
    subtitle: str = "",
    figures: Sequence[Figure] = (),
    tables: Mapping[str, Rows] | None = None,
    samples: Sequence[Sample] = (),
) -> Path:
    """Write the report of a run, atomically, and return its path.

    Args:
        run_dir: the run folder.
        path: the HTML file, which replaces an older one; `report.html` in the run folder when None.
        title: heading of the page; the folder's name when None.
        subtitle: a sentence under the title, before those about the run.
        figures: cards before those of the run.
        tables: heading -> rows of a table, after the curves.
        samples: shown as a grid, in this order.

    Raises:
        CheckpointError: it is no run folder, something in it cannot be read, or the report cannot be written.
    """
    run = read_run(run_dir)
    path = run_dir / REPORT_NAME if path is None else path
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise CheckpointError("this is no regular file that a page could replace", str(path), "name another file")
    title = run.run_dir.absolute().name if title is None else title
    text = page.page(
        title,
        [
            page.header(title, subtitle, _status(run), _places(run)),
            page.figure_cards(figures),
            page.figure_cards(_figures(run)),
            page.section("Training", _training_charts(run)),
            page.section("Experts", page.chart_grid(_small_charts(run.steps, _EXPERT_CHARTS))),
            page.section("Loss by data source", _source_charts(run.steps)),
            page.section("Held-out loss by data source", _source_charts(run.evaluations)),
            *[page.section(heading, page.table(rows)) for heading, rows in (tables or {}).items()],
            page.section("Samples", page.sample_grid(samples)),
            page.section("Data", page.table(_data_rows(run))),
            page.section("Starts", page.table(_start_rows(run)) + _changes(run)),
            page.section("Settings", page.folded("Configuration", run.config_yaml) + _environment(run)),
            page.section("Left out of this page", page.bullets(run.problems)),
        ],
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"the report cannot be written: {reason}", str(path), "name another file") from None
    return path


def _status(run: RunRecord) -> str:
    """Say how far the run has come and how it ended."""
    last, total = run.last_step, run.train_iters
    done = f"{last:,} of {total:,} steps" if total is not None else f"{last:,} steps"
    state = state_of(run)
    text = {
        "running": f"Running: {done} so far.",
        "finished": f"Finished: {done}.",
        "failed": f"Failed after {done}: {state.detail}",
        "stopped": f"Stopped after {done} ({state.detail}).",
        "killed": f"Killed after {done} ({state.detail}).",
        "diverged": f"Diverged after {done}.",
        "ended": f"Ended after {done}.",
    }[state.word]
    if diverged := divergence(run):
        text += f" Note: {diverged}."
    if run.exported:
        text += f" Exported to {run.exported.get('directory')}."
    return text


def _places(run: RunRecord) -> str:
    """Name the model and the folder."""
    model = section(run.config, "model").get("hf_path")
    return (f"Model {model}, run" if model else "Run") + f" folder {run.run_dir.absolute()}."


def _figures(run: RunRecord) -> list[Figure]:
    """Headline numbers, as far as the run has them."""
    figures = []
    losses = series(run.steps, "loss")
    if losses:
        last = "not finite" if unfinite_steps(run.steps[-1:]) else f"{losses[-1][1]:.4g}"
        figures.append(Figure("Loss", last, f"{losses[0][1]:.4g} at step {losses[0][0]:,}"))
    heldout = series(run.evaluations, "loss")
    if heldout:
        step, best = min(heldout, key=lambda point: point[1])
        last = "not finite" if unfinite_steps(run.evaluations[-1:]) else f"{heldout[-1][1]:.4g}"
        figures.append(Figure("Held-out loss", last, f"best {best:.4g} after step {step:,}"))
    tokens = sum(number(row, "tokens") or 0 for row in run.steps)
    if tokens:
        epoch = number(run.steps[-1], "epoch")
        figures.append(Figure("Tokens", _short(tokens), f"{epoch:.2f} passes over the data" if epoch else ""))
    speed = recent(run.steps, "tokens_per_second")
    if speed:
        figures.append(Figure("Tokens per second", _short(speed), _flops(run)))
    seconds = sum((number(row, "step_seconds") or 0) * (number(row, "steps") or 1) for row in run.steps)
    if seconds:
        starts = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
        figures.append(Figure("Time in steps", _duration(seconds), f"{_step_time(run)} per step{starts}"))
    peak = max((number(row, "peak_memory_bytes") or 0 for row in run.steps), default=0)
    if peak:
        figures.append(Figure("Peak memory", f"{peak / 2**30:.3g} GiB", "of the rank that used most"))
    if skipped := sum(row.get("skipped") is True for row in run.steps):
        figures.append(Figure("Updates left out", f"{skipped:,}", "loss or gradients not finite, or a spike", False))
    return figures


def _step_time(run: RunRecord) -> str:
    seconds = recent(run.steps, "step_seconds") or 0.0
    return f"{seconds:.3g} s"


def _flops(run: RunRecord) -> str:
    """Describe the use of the devices."""
    mfu, flops = recent(run.steps, "mfu"), recent(run.steps, "flops_per_second_per_device")
    if mfu:
        return f"MFU {mfu:.1%}"
    return f"{flops / 1e12:.3g} TFLOP/s per device" if flops else ""


def _training_charts(run: RunRecord) -> str:
    """Draw the loss at full width, then small charts of what else was logged."""
    if not run.steps:
        return '<p class="empty">No step was logged yet.</p>'
    losses, heldout = series(run.steps, "loss"), series(run.evaluations, "loss")
    smoothing = _smoothing(losses)
    loss = line_chart(losses, "Loss over steps", 960, 320, _marks(run), smoothing, True, heldout)
    caption = '<span class="key smooth-key"></span>loss over optimizer steps'
    caption += ", moving average over measured values" if smoothing > 1 else ""
    caption += '<span class="key second-key"></span>loss on held-out data' if heldout else ""
    return page.chart_grid([page.chart_figure(loss, caption, wide=True), *_small_charts(run.steps, _STEP_CHARTS)])


def _smoothing(points: Sequence[tuple[int, float]]) -> int:
    return max(1, len(points) // _POINTS_PER_SMOOTHED)


def _marks(run: RunRecord) -> dict[int, str]:
    """Return the steps after which the run was resumed, with what was changed in the layout."""
    marks = {}
    for before, start in itertools.pairwise(run.starts):
        step = number(start, "after_step")
        if step:
            marks[int(step)] = "resumed" if _layout(before) == _layout(start) else f"resumed: {_layout(start)}"
    return marks


def _small_charts(rows: Sequence[Record], charts: Mapping[str, tuple[str, float, bool]]) -> list[str]:
    """Draw one chart for each key that several steps logged."""
    figures = []
    for heading, (key, factor, allow_logarithmic) in charts.items():
        points = series(rows, key, factor)
        if len(points) > 1 and any(value for _, value in points):
            figures.append(_small_chart(points, heading, allow_logarithmic))
    return figures


def _small_chart(points: Sequence[tuple[int, float]], heading: str, allow_logarithmic: bool) -> str:
    chart = line_chart(points, heading, 320, 170, None, _smoothing(points), allow_logarithmic)
    return page.chart_figure(chart, escape(heading))


def _source_charts(rows: Sequence[Record]) -> str:
    """Draw the loss of every data source, where there are several: of those with the most label tokens."""
    label_tokens, losses = _per_source(rows, "source_label_tokens"), _per_source(rows, "source_losses")
    if len(losses) < 2:
        return ""
    names = sorted(losses, key=lambda name: -sum(value for _, value in label_tokens.get(name, ())))
    return page.chart_grid([_small_chart(losses[name], name, True) for name in names[:_MAX_SOURCE_CHARTS]])


def _per_source(rows: Sequence[Record], key: str) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of each data source."""
    values: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        inner = section(row, key)
        for name in inner:
            value = number(inner, name)
            if value is not None:
                values.setdefault(name, []).append((row["step"], value))
    return values


def _data_rows(run: RunRecord) -> list[dict[str, object]]:
    """Return one table row per data source, and one for each kind of rows that could not be used."""
    label_tokens = _per_source(run.steps, "source_label_tokens")
    losses, heldout = _per_source(run.steps, "source_losses"), _per_source(run.evaluations, "source_losses")
    rows: list[dict[str, object]] = [
        {
            "source": name,
            "label tokens": f"{sum(value for _, value in values):,.0f}",
            "last loss": f"{losses[name][-1][1]:.4g}" if name in losses else "",
        }
        for name, values in label_tokens.items()
    ]
    rows += [
        {"source": name, "label tokens": "held out", "last loss": f"{values[-1][1]:.4g}"}
        for name, values in heldout.items()
    ]
    for key, words in _COUNTED_ROWS.items():
        count = sum(number(row, key) or 0 for row in run.steps)
        if count and rows:
            rows.append({"source": words, "label tokens": f"{count:,.0f} in all"})
    return rows


def _start_rows(run: RunRecord) -> list[dict[str, object]]:
    """Return one table row per start."""
    return [
        {
            "started": str(start.get("time", "")).replace("T", " "),
            "after step": f"{number(start, 'after_step') or 0:,.0f}",
            "ranks": start.get("ranks", ""),
            "device": start.get("device", ""),
            "layout": _layout(start),
            "host": start.get("host", ""),
            "commit": start.get("commit") or "",
        }
        for start in run.starts
    ]


def _layout(start: Record) -> str:
    """Describe the parallel sizes of a start that are not 1."""
    parallel = section(section(start, "config"), "parallel")
    sizes = {words: number(parallel, key) or 1 for key, words in _LAYOUT_WORDS.items()}
    ranks = number(start, "ranks") or 1
    data = ranks / (sizes["tensor"] * sizes["pipeline"] * sizes["context"])
    parts = [f"{words} {size:.0f}" for words, size in sizes.items() if size > 1 and not words.startswith("expert")]
    parts += [f"data {data:.0f}"] * (data > 1)
    parts += [f"{words} {size:.0f}" for words, size in sizes.items() if size > 1 and words.startswith("expert")]
    return ", ".join(parts) or "one process"


def _changes(run: RunRecord) -> str:
    """List what each start changed in settings and versions."""
    lines = []
    for before, start in itertools.pairwise(run.starts):
        for key in ("config", "versions"):
            changes = list(changed_settings(section(before, key), section(start, key)))
            if changes:
                step = f"{number(start, 'after_step') or 0:,.0f}"
                lines.append(f"after step {step}: {', '.join(changes)}")
    return page.folded("Changes between starts", "\n".join(lines))


def _environment(run: RunRecord) -> str:
    """Show what the last start ran on and how it was started."""
    described = {key: value for key, value in (run.starts[-1] if run.starts else {}).items() if key != "config"}
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in described.items()]
    return page.folded("Environment of the last start", "\n".join(lines))


def _short(value: float) -> str:
    """Format a number with three digits: 412, 4.12k, 41.2M."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _duration(seconds: float) -> str:
    """Format a time: 41 s, 12 min, 5.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:,.1f} h"
