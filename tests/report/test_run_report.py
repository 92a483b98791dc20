"""The report of a run: any run folder, however the run went, gives a page that tells the truth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_vlm.checkpoint.run_folder import step_folder
from megatron_vlm.checkpoint.run_owner import OWNER_NAME, describe_process
from megatron_vlm.errors import CheckpointError, UserError
from megatron_vlm.report.page import Figure
from megatron_vlm.report.run_record import read_run
from megatron_vlm.report.run_report import write_report
from tests.report.parsed_page import HOSTILE, ParsedPage
from tools import report as tool

REPOSITORY = Path(__file__).resolve().parents[2]


def step(number: int, **figures: Any) -> dict[str, Any]:
    """A record of a text-only run with one data source."""
    return {
        "step": number,
        "train_iters": 60,
        "loss": 5.0 / number,
        "grad_norm": 1.0 + number % 3,
        "lr": 1e-3,
        "tokens": 1000,
        "images": 0,
        "step_seconds": 0.5,
        "images_per_second": 0.0,
        "tokens_per_second": 2000.0,
        "peak_memory_bytes": 2**30,
        "source_losses": {"train": 5.0 / number},
        "source_label_tokens": {"train": 100},
        **figures,
    }


def start(after_step: int, tensor: int = 1, **values: Any) -> dict[str, Any]:
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": 1}
    config = {"parallel": parallel, "optimizer": {"lr": 1e-3}}
    return {"time": "2026-01-01T00:00:00+0000", "ranks": 4, "after_step": after_step, "config": config, **values}


def write(path: Path, rows: list[dict[str, Any]], ending: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + ending, encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was resumed twice, ended, and was evaluated."""
    folder = tmp_path / "first"
    folder.mkdir()
    write(folder / "metrics.jsonl", [step(number) for number in range(1, 61)])
    write(folder / "evaluations.jsonl", [{"step": number, "loss": 6.0 / number} for number in (20, 40, 60)])
    write(folder / "starts.jsonl", [start(0), start(20), start(40, tensor=2)])
    (folder / "config.yaml").write_text("model:\n  hf_path: models/tiny\ntrain:\n  train_iters: 60\n")
    step_folder(folder / "checkpoints", 60).mkdir(parents=True)
    return folder


def page_of(run_dir: Path) -> str:
    text = write_report(run_dir).read_text(encoding="utf-8")
    ParsedPage(text)
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(chart)
        assert not re.search(r"\b(nan|inf)\b", chart)
    return text


def card(text: str, label: str) -> tuple[str, str]:
    """Value and note of a headline number."""
    found = re.search(rf'"label">{label}</div><div class="value">(.*?)</div>(?:<div class="note">(.*?)</div>)?', text)
    assert found is not None, label
    return found[1], found[2] or ""


def test_a_finished_run(run_dir: Path) -> None:
    text = page_of(run_dir)
    assert "<h1>first</h1>" in text and "Finished: 60 of 60 steps." in text
    assert card(text, "Loss") == ("0.08333", "5 at step 1")
    assert card(text, "Held-out loss") == ("0.1", "best 0.1 after step 60")
    assert card(text, "Tokens")[0] == "60k" and card(text, "Tokens per second")[0] == "2k"
    assert card(text, "Time in steps") == ("30 s", "0.5 s per step, 3 starts")
    assert card(text, "Peak memory")[0] == "1 GiB"
    assert text.count('class="dot"') == 3
    assert ">resumed</text>" in text and ">resumed: tensor 2, data 2</text>" in text
    assert "after step 40: parallel.tensor_model_parallel_size 1 -&gt; 2" in text
    assert "models/tiny" in text and "Left out of this page" not in text
    assert "Images per second" not in text, "there are none"


@pytest.mark.parametrize(
    "files, status",
    [
        (
            {"stopped.json": '{"reason": "signal SIGTERM", "step": 30}'},
            "Stopped after 30 of 60 steps (signal SIGTERM).",
        ),
        ({OWNER_NAME: "{}"}, "Running: 30 of 60 steps so far."),
        ({"user_error_7.txt": "DataError: no rows\n"}, "Failed after 30 of 60 steps: DataError: no rows"),
        ({}, "Ended after 30 of 60 steps."),
        ({"exported.json": '{"directory": "out/hf", "step": 60}'}, "Exported to out/hf."),
    ],
)
def test_how_a_run_ended(run_dir: Path, files: dict[str, str], status: str) -> None:
    write(run_dir / "metrics.jsonl", [step(number) for number in range(1, 31)])
    step_folder(run_dir / "checkpoints", 60).rmdir()
    for name, content in files.items():
        (run_dir / name).write_text(content)
    assert status in page_of(run_dir)


def test_owners_that_are_gone(run_dir: Path) -> None:
    """One of this machine is looked up among its processes, another's must have given a sign of life lately."""
    write(run_dir / "metrics.jsonl", [step(number) for number in range(1, 31)])
    step_folder(run_dir / "checkpoints", 60).rmdir()
    owner = run_dir / OWNER_NAME
    owner.write_text(json.dumps(describe_process()))
    assert "Running: 30 of 60 steps so far." in page_of(run_dir)
    owner.write_text(json.dumps({**describe_process(), "process_start": 1}))
    assert f"Killed after 30 of 60 steps (process {os.getpid()} on " in page_of(run_dir)
    owner.write_text(json.dumps({**describe_process(), "host": "elsewhere"}))
    assert "Running: 30 of 60 steps so far." in page_of(run_dir)
    os.utime(owner, (1, 1))
    assert f"Killed after 30 of 60 steps (process {os.getpid()} on elsewhere is gone)" in page_of(run_dir)


def test_the_last_step_is_not_done_before_it_is_saved(run_dir: Path) -> None:
    step_folder(run_dir / "checkpoints", 60).rmdir()
    assert "Finished: 60 of 60 steps." in page_of(run_dir), "somebody deleted the checkpoints"
    (run_dir / OWNER_NAME).write_text(json.dumps({**describe_process(), "process_start": 1}))
    assert "Killed after 60 of 60 steps" in page_of(run_dir)


def test_a_run_without_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = page_of(tmp_path)
    assert "No step was logged yet." in text and "<svg" not in text
    (tmp_path / "config.yaml").write_text("train: {train_iters: 7}\n")
    (tmp_path / "metrics.jsonl").unlink()
    assert "Ended after 0 of 7 steps." in page_of(tmp_path)


def test_one_step_is_no_curve(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [step(1)])
    assert "fewer than two points" in page_of(run_dir)


def test_of_repeated_steps_the_later_start_counts(run_dir: Path) -> None:
    """Also of those that the later start has not reached again."""
    first = [step(number) for number in range(1, 31)]
    later = [step(number, loss=9.0) for number in range(21, 26)]
    write(run_dir / "metrics.jsonl", first + later)
    found = [(row["step"], row["loss"]) for row in read_run(run_dir).steps]
    assert [number for number, _ in found] == list(range(1, 26))
    assert {loss for number, loss in found if number > 20} == {9.0}


def test_damaged_lines_are_left_out_and_counted(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines[10], lines[20], lines[30] = "\x00" * 40, lines[20][:50], '{"step": "x"}'
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "lo')
    (run_dir / "stopped.json").write_text("")
    (run_dir / "config.yaml").write_text("a: b: c")
    text = page_of(run_dir)
    assert "3 damaged lines of metrics.jsonl" in text and "stopped.json, which is damaged" in text
    assert "config.yaml, which is damaged" in text and "a: b: c" in text
    assert len(read_run(run_dir).steps) == 57


@pytest.mark.parametrize("name", ["metrics.jsonl", "starts.jsonl"])
def test_a_file_may_end_anywhere(run_dir: Path, name: str) -> None:
    whole = (run_dir / name).read_bytes()
    for size in range(0, min(len(whole), 1200), 7):
        (run_dir / name).write_bytes(whole[:size])
        assert not read_run(run_dir).problems
    page_of(run_dir)


ODD_VALUES = [None, True, HOSTILE, "\ud800", [], {}, {"a": HOSTILE}, float("nan"), float("inf"), -5, 10**400, 1e308, 0]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:12])
def test_odd_values_do_no_harm(run_dir: Path, value: Any) -> None:
    """In every place of some steps, evaluations and starts at once, and in the settings."""
    odd = [dict.fromkeys(step(1), value) | {"step": number} for number in (70, 71)]
    write(run_dir / "metrics.jsonl", [step(1), step(2), *odd])
    write(run_dir / "evaluations.jsonl", [{"step": 1, "loss": value, "source_losses": value}, {"step": value}])
    write(run_dir / "starts.jsonl", [start(0), dict.fromkeys(start(0), value), start(1, config={"parallel": value})])
    write(run_dir / "stopped.json", [{"reason": value}])
    write(run_dir / "exported.json", [{"directory": value}])
    (run_dir / "config.yaml").write_text(json.dumps({"train": value, "model": {"hf_path": value}}))
    assert HOSTILE not in page_of(run_dir)


def test_sources_have_curves_where_there_are_several(run_dir: Path) -> None:
    rows = [
        step(number, source_losses={"a": 1.0 / number, HOSTILE: 2.0}, source_label_tokens={"a": 10, HOSTILE: 30})
        for number in range(1, 10)
    ]
    write(run_dir / "metrics.jsonl", rows)
    write(run_dir / "evaluations.jsonl", [{"step": 9, "loss": 1.0, "source_losses": {"held": 0.25}}])
    text = page_of(run_dir)
    assert "Loss by data source" in text and "Held-out loss by data source" not in text
    cells = re.findall(r"<td>(.*?)</td>", text.partition(">Data</h2>")[2].partition("</table>")[0])
    assert cells[:3] == ["a", "90", "0.1111"] and cells[4:] == ["270", "2", "held", "held out", "0.25"]


def test_trouble_is_shown(run_dir: Path) -> None:
    rows = [step(1), step(2, loss=None, skipped=True), step(3, bad_rows=2), step(4, bad_rows=3)]
    write(run_dir / "metrics.jsonl", rows)
    text = page_of(run_dir)
    assert card(text, "Updates left out")[0] == "1" and 'class="card failed"' in text
    assert "<td>rows that cannot be used</td><td>5 in all</td>" in text


def test_the_caller_adds_its_own(run_dir: Path, tmp_path: Path) -> None:
    figures, tables = [Figure("Exact match", "97 %")], {"Time": [{"phase": "draw", "seconds": 1.5}]}
    path = tmp_path / "new" / "page.html"
    assert write_report(run_dir, path, title="Demo", subtitle="It looks.", figures=figures, tables=tables) == path
    text = path.read_text()
    assert card(text, "Exact match")[0] == "97 %" and card(text, "Loss")[0] and "<td>draw</td>" in text
    assert "<h1>Demo</h1><p>It looks.</p><p>Finished" in text


def test_an_older_report_is_replaced_whole(run_dir: Path) -> None:
    (run_dir / "report.html").write_text("older")
    assert write_report(run_dir).read_text().startswith("<!doctype html>")
    assert not list(run_dir.glob("*.partial"))


@pytest.mark.parametrize("given", ["missing", "file", "empty", "checkpoint", "unreadable"])
def test_what_is_no_run_is_refused(run_dir: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "empty"
    folder.mkdir()
    paths = {"missing": run_dir / "none", "file": run_dir / "config.yaml", "empty": folder, "unreadable": folder}
    expected = {"missing": "no such folder", "file": "not a folder", "unreadable": "this is a pipe or device"}
    if given == "unreadable":
        os.mkfifo(folder / "metrics.jsonl")
    path = paths.get(given, step_folder(run_dir / "checkpoints", 60))
    assert tool.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("CheckpointError: ") and str(path) in line
    assert expected.get(given, "not a run folder") in line
    assert given != "checkpoint" or f"such as {run_dir}" in line


def test_a_report_that_cannot_be_written_is_an_error_of_one_line(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write_report(run_dir, run_dir / "config.yaml" / "page.html")
    assert isinstance(caught.value, UserError) and "name another file" in str(caught.value)
    with pytest.raises(CheckpointError, match="no regular file"):
        write_report(run_dir, run_dir)
    assert not list(run_dir.parent.glob("*.partial"))


def test_only_a_regular_file_is_replaced(run_dir: Path, tmp_path: Path) -> None:
    """Not a device, which root could, nor a link such as /dev/stdout."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link").symlink_to("page.html")
    for name in ("pipe", "link", "."):
        with pytest.raises(CheckpointError, match="no regular file"):
            write_report(run_dir, tmp_path / name)
    assert (tmp_path / "page.html").read_text() == "old"


def test_the_tool_starts_without_torch(run_dir: Path) -> None:
    code = "import sys; from tools import report; code = report.main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    output = run_dir / "page.html"
    command = [sys.executable, "-c", code, str(run_dir), "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, modules = done.stdout.splitlines()
    assert said == f"wrote {output}" and output.exists()
    assert not {"torch", "numpy", "PIL", "transformers"} & {*modules.split()}


def test_the_end_of_long_logs(run_dir: Path) -> None:
    """For a list of runs: whole lines from the end, however the limit falls."""
    size = (run_dir / "metrics.jsonl").stat().st_size
    whole = read_run(run_dir)
    longest = max(len(json.dumps(row)) + 1 for row in whole.steps)
    for most in (1, 300, 1000, size - 1, size, size + 1):
        part = read_run(run_dir, most)
        assert part.problems == []
        assert list(part.steps) == list(whole.steps)[len(whole.steps) - len(part.steps) :]
        kept = sum(len(json.dumps(row)) + 1 for row in part.steps)
        assert most - longest < kept <= most or kept == size
