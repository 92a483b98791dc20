"""The table and the page of a sweep, as a CSV reader, an HTML parser and plotly's own figures see them."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.sweeps import plots
from megatron_vlm.sweeps.manifest import Sweep, begin_attempt, end_attempt
from megatron_vlm.sweeps.results import choose_metric, ranked, read_result, varied_keys
from megatron_vlm.sweeps.status import status_of
from megatron_vlm.sweeps.sweep_report import write_sweep_report
from tests.report.parsed_page import HOSTILE, ParsedPage
from tests.sweeps.sweep_files import Files, leave_run, write_lines
from tools import sweep as tool

LOSSES = [4, 3, 2, 1], [8, 4, 2, 0.5], [9, 9]
HELDOUT = (1.5, 1.6), (0.75, 0.85), ()


@pytest.fixture
def sweep(files: Files) -> Sweep:
    """Four points: two done, one that failed at step 2 with an error like a page, one that has not begun."""
    sweep = files.make(
        grid={"optimizer.lr": [1e-4, 1e-2], "optimizer.schedule": ["constant", "cosine"]},
        derived={"optimizer.min_lr": "optimizer.lr / 10"},
    )
    for point, losses, heldout in zip(sweep.points, LOSSES, HELDOUT, strict=False):
        run_dir = leave_run(sweep, point, 4, saved=4 if heldout else None, losses=losses)
        if heldout:
            rows = [{"step": step, "loss": loss} for step, loss in zip((2, 4), heldout, strict=True)]
            write_lines(run_dir / "evaluations.jsonl", rows)
        begin_attempt(sweep, point, {"id": "a"})
        end_attempt(sweep, point, "a", 0 if heldout else 1)
    sweep.log_path(sweep.points[2]).write_text(f"== start of point 2\nValueError: {HOSTILE}\n")
    return sweep


def written(sweep: Sweep, metric: str | None = None) -> tuple[list[dict[str, str]], str]:
    table, page = write_sweep_report(sweep, status_of(sweep)[0], metric=metric)
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream)), page.read_text()


def test_the_table(sweep: Sweep) -> None:
    rows, _ = written(sweep)
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["state"] for row in rows] == ["done", "done", "failed", "pending"]
    assert [row["optimizer.lr"] for row in rows] == ["0.0001", "0.0001", "0.01", "0.01"]
    assert [row["optimizer.schedule"] for row in rows] == ["constant", "cosine"] * 2
    assert [row["heldout_loss_best"] for row in rows] == ["1.5", "0.75", "", ""]
    assert [row["heldout_loss_best_step"] for row in rows] == ["2", "2", "", ""]
    assert [row["heldout_loss_last"] for row in rows] == ["1.6", "0.85", "", ""]
    assert [row["train_loss_last"] for row in rows] == ["1.0", "0.5", "9.0", ""]
    assert rows[0]["tokens"] == "40.0" and float(rows[0]["hours"]) == pytest.approx(2 / 3600)
    assert rows[2]["detail"] == f"ValueError: {HOSTILE}" and rows[2]["step"] == "2"
    assert rows[0]["run_dir"] == str(sweep.points[0].run_dir)


def test_the_page_needs_nothing_else(sweep: Sweep) -> None:
    _, text = written(sweep)
    page = ParsedPage(text)
    assert page.addresses == []
    assert "<script>alert" not in text and "ValueError: &lt;script&gt;alert" in text
    assert "4 points: 2 done, 1 pending, 1 failed." in page.text
    assert 'label">Lowest held-out loss</div><div class="value">0.75<' in text
    assert "others 1.5 to 1.5" in page.text
    assert text.count('class="plotly-graph-div"') == 3
    assert '"showSendToCloud": false' in text, "else the page has a button that uploads the figures"
    assert len(text) < 6 * 2**20, "plotly's script is 4.8 MB"


def test_lines_of_the_page_are_ordered(sweep: Sweep) -> None:
    _, text = written(sweep)
    cells = re.findall(r"<tr><td>(\d)</td>", text)
    assert cells == ["1", "0", "2", "3"], "best first, without a figure last"
    _, text = written(sweep, "train_loss_best")
    assert re.findall(r"<tr><td>(\d)</td>", text) == ["1", "0", "2", "3"]
    _, text = written(sweep, "tokens")
    assert re.findall(r"<tr><td>(\d)</td>", text)[0] in "01", "more tokens are better"
    with pytest.raises(ConfigError, match="there is no metric loss"):
        written(sweep, "loss")


def test_parallel_coordinates(sweep: Sweep) -> None:
    """The figure that the browser draws has the points' values: logarithms and categories with their texts."""
    results = [read_result(status) for status in status_of(sweep)[0]]
    keys = varied_keys(results, {"optimizer.min_lr"})
    assert keys == ["optimizer.lr", "optimizer.schedule"], "what follows from others is no axis"
    figure = plots.parallel_coordinates(ranked(results, "train_loss_last"), keys, "train_loss_last")
    assert figure is not None
    lr, schedule, loss = figure.data[0].dimensions
    assert [*loss.values] == [0.5, 1.0, 9.0] == [*figure.data[0].line.color]
    assert [*lr.values] == pytest.approx([-4, -4, -2]) and [*lr.ticktext] == ["0.0001", "0.01"]
    assert [schedule.ticktext[place] for place in schedule.values] == ["cosine", "constant", "constant"]
    assert (lr.label, schedule.label) == ("lr", "schedule")
    assert plots.parallel_coordinates(results, keys, "heldout_loss_best") is not None
    assert plots.parallel_coordinates(results[:1], keys, "heldout_loss_best") is None


def test_curves(sweep: Sweep) -> None:
    results = [read_result(status) for status in status_of(sweep)[0]]
    figure = plots.curves(results, "heldout_loss_best", "loss", lambda result: result.losses, smooth=False)
    assert figure is not None
    assert [[*trace.y] for trace in figure.data] == [[4, 3, 2, 1], [8, 4, 2, 0.5], [9, 9]]
    assert [trace.name for trace in figure.data] == [point.name for point in sweep.points[:3]]
    assert figure.data[1].line.color == "rgb(31, 119, 208)", "the best is blue"
    assert figure.data[0].line.color == "rgb(226, 134, 42)" and figure.data[2].line.color == "#7d8794"
    assert plots.curves(results[3:], "heldout_loss_best", "loss", lambda result: result.losses, smooth=False) is None


def test_long_curves_are_thinned(files: Files) -> None:
    sweep = files.make()
    for point in sweep.points:
        leave_run(sweep, point, 0, losses=[1000.0 if step == 50_000 else 1.0 for step in range(100_000)])
    results = [read_result(status) for status in status_of(sweep)[0]]
    figure = plots.curves(results, "train_loss", "loss", lambda result: result.losses, smooth=False)
    assert figure is not None
    assert sum(len(trace.y) for trace in figure.data) <= 40_100
    assert all(max(trace.y) == 1000 for trace in figure.data), "no peak is lost"


def test_a_sweep_of_which_nothing_has_begun(files: Files) -> None:
    rows, text = written(files.make())
    assert [row["state"] for row in rows] == ["pending"] * 3
    assert "plotly" not in text and "3 points: 3 pending." in text
    assert choose_metric([], None) == "train_loss"


def test_without_plotly(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find(name, *rest)
    )
    assert tool.main(["report", "out"]) == 2
    assert "plotly is not installed; only results.csv was written" in capsys.readouterr().err
    assert (sweep.folder / "results.csv").exists() and not (sweep.folder / "report.html").exists()


def test_the_command(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["report", "sweep.yaml", "--output", "elsewhere", "--metric", "train_loss"]) == 0
    assert capsys.readouterr().out == "wrote elsewhere/results.csv\nwrote elsewhere/report.html\n"
    assert "Ranked by train_loss" in (tmp_path / "elsewhere/report.html").read_text()


def test_a_point_that_diverged_is_not_the_best(sweep: Sweep) -> None:
    """It is done, and was the best until its losses were no numbers, which training writes as null."""
    path = sweep.points[1].run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row if row["step"] < 3 else {**row, "loss": None} for row in rows])
    path.write_text(path.read_text() + "{damaged\n")
    evaluations = [{"step": 2, "loss": 0.75}, {"step": 4, "loss": None}]
    write_lines(sweep.points[1].run_dir / "evaluations.jsonl", evaluations)
    for metric in (None, "train_loss_best", "train_loss", "tokens"):
        rows, text = written(sweep, metric)
        assert re.findall(r"<tr><td>(\d)</td>", text)[0] == "0"
    row = rows[1]
    assert [row[name] for name in ("heldout_loss_last", "train_loss", "train_loss_last")] == ["nan"] * 3
    assert row["heldout_loss_best"] == "0.75" and row["state"] == "done"
    said = (
        "the loss is not finite at 2 of 4 logged steps, first at step 3; the held-out loss is not finite at 1 of 2 "
        "logged steps, first at step 4; 1 damaged line of metrics.jsonl"
    )
    assert row["problems"] == said and said in ParsedPage(text).text and "done, diverged" in text


def test_losses_near_the_largest_number(sweep: Sweep) -> None:
    leave_run(sweep, sweep.points[3], 0, losses=[1.5e308] * 20)
    rows, _ = written(sweep)
    assert float(rows[3]["train_loss"]) == 1.5e308
