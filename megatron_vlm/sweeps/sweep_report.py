"""Writes a sweep as one table (CSV) and one HTML page that needs nothing else; plotly draws, its script is inside."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files.small_files import replace_durably
from megatron_vlm.report import page
from megatron_vlm.report.page import Figure
from megatron_vlm.sweeps.manifest import Sweep
from megatron_vlm.sweeps.points import short_keys, value_text
from megatron_vlm.sweeps.results import (
    METRICS,
    Result,
    choose_metric,
    csv_text,
    is_ranked,
    ranked,
    read_result,
    varied_keys,
)
from megatron_vlm.sweeps.status import PointStatus, count_states

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Plot

TABLE_NAME, PAGE_NAME = "results.csv", "report.html"
_PLOT_OPTIONS = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,  # plotly's page would have a button that uploads the figures
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


def write_sweep_report(
    sweep: Sweep, statuses: Sequence[PointStatus], folder: Path | None = None, metric: str | None = None
) -> list[Path]:
    """Write the table and the page, atomically, and return their paths.

    Args:
        sweep: the sweep.
        statuses: of its points.
        folder: where they go, replacing older ones; the sweep's folder when None.
        metric: what points are ranked by; the held-out loss when None, the training loss where there is none.

    Raises:
        ConfigError: there is no such metric, or plotly is not installed (the table is written all the same).
        CheckpointError: they cannot be written.
    """
    results = [read_result(status) for status in statuses]
    metric = choose_metric(results, metric)
    folder = sweep.folder if folder is None else folder
    _write(folder / TABLE_NAME, csv_text(results))
    if importlib.util.find_spec("plotly") is None:
        fix = "pip install 'megatron-vlm[sweep]' (or plotly)"
        raise ConfigError(f"plotly is not installed; only {TABLE_NAME} was written", str(folder), fix)
    _write(folder / PAGE_NAME, _page(sweep, results, metric))
    return [folder / TABLE_NAME, folder / PAGE_NAME]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, text)
    except OSError as error:
        what = f"the report cannot be written: {error.strerror or error}"
        raise CheckpointError(what, str(path), "give another folder with --output") from None


def _page(sweep: Sweep, results: Sequence[Result], metric: str) -> str:
    from plotly.offline import get_plotlyjs

    from megatron_vlm.sweeps import plots

    keys, order = varied_keys(results, sweep.settings.derived), ranked(results, metric)
    coordinates = plots.parallel_coordinates(order, keys, metric)
    losses = plots.curves(order, metric, "training loss", lambda result: result.losses, smooth=True)
    heldout = plots.curves(order, metric, "held-out loss", lambda result: result.heldout, smooth=False)
    drawn = [plot for plot in (coordinates, losses, heldout) if plot is not None]
    return page.page(
        f"{sweep.name}: sweep",
        [
            f"<script>{get_plotlyjs()}</script>" if drawn else "",
            page.header(
                sweep.name,
                f"{len(results)} points: {count_states([result.status for result in results])}.",
                f"Base {sweep.settings.base}, folder {sweep.folder}.",
                f"Ranked by {metric}, the {METRICS[metric]}; better points are blue, worse ones orange.",
            ),
            page.figure_cards(_cards(order, keys, metric)),
            page.section("Not done", page.bullets([*filter(None, map(_not_done, results))])),
            page.section("Problems", page.bullets([*filter(None, map(_problems, results))])),
            page.section(
                "What leads where", _plot(coordinates, "Drag along an axis to pick points; drag its name to move it.")
            ),
            page.section("Training loss", _plot(losses)),
            page.section("Held-out loss", _plot(heldout)),
            page.section("Points, best first", page.table([_row(result, keys, metric) for result in order])),
        ],
    )


def _plot(plot: Plot | None, note: str = "") -> str:
    if plot is None:
        return ""
    html: str = plot.to_html(full_html=False, include_plotlyjs=False, config=_PLOT_OPTIONS)
    return f'<div class="plot">{html}<div class="note">{note}</div></div>'


def _cards(order: Sequence[Result], keys: Sequence[str], metric: str) -> list[Figure]:
    """The best point: its figure and its values."""
    best = order[0]
    if not is_ranked(best, metric):
        return []
    others = [result.metrics[metric] for result in order[1:] if is_ranked(result, metric)]
    note = f"others {min(others):.4g} to {max(others):.4g}" if others else ""
    overrides = best.status.point.overrides
    cards = [Figure(METRICS[metric].capitalize(), f"{best.metrics[metric]:.4g}", note)]
    return cards + [Figure(short_keys(keys)[key], value_text(overrides[key])) for key in keys if key in overrides]


def _row(result: Result, keys: Sequence[str], metric: str) -> dict[str, object]:
    """A line of the page's table."""
    status, overrides, names = result.status, result.status.point.overrides, short_keys(keys)
    steps = f"{status.step}" + (f"/{status.train_iters}" if status.train_iters is not None else "")
    shown = dict.fromkeys([metric, "heldout_loss_last", "train_loss", "tokens_per_second"])
    return {
        "point": status.point.index,
        **{names[key]: value_text(overrides[key]) if key in overrides else "" for key in keys},
        "state": f"{status.state}, diverged" if result.diverged else status.state,
        "steps": steps,
        **{METRICS[name]: f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in shown},
    }


def _not_done(result: Result) -> str:
    status = result.status
    return (
        "" if status.state == "done" else f"{status.point}: {status.state}{f': {status.detail}' * bool(status.detail)}"
    )


def _problems(result: Result) -> str:
    return f"{result.status.point}: {'; '.join(result.problems)}" if result.problems else ""
