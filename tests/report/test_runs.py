"""tools/runs.py: which folders are runs, and what differs between two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.checkpoint.run_folder import step_folder
from megatron_vlm.checkpoint.run_owner import OWNER_NAME, describe_process
from megatron_vlm.report.run_report import write_report
from tools import runs as tool


def make_run(folder: Path, lr: float, losses: list[float], **start: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"run_dir": str(folder), "train": {"train_iters": len(losses)}, "optimizer": {"lr": lr, "eps": 1e-8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": step, "loss": loss, "tokens": 10, "tokens_per_second": 100.0} for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {"time": "2026-11-30T10:20:30+0000", "host": "n1", "ranks": 2, "versions": {"torch": "2.15.0"}, **start}
    (folder / "starts.jsonl").write_text(json.dumps(described) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "a", 1e-3, [5.0, 4.0, 3.0])
    step_folder(tmp_path / "a/checkpoints", 3).mkdir(parents=True)
    second = make_run(tmp_path / "deep/er/b", 2e-3, [6.0, 2.0, 1.0], ranks=4, versions={"torch": "2.14.0"})
    (second / OWNER_NAME).write_text(json.dumps(describe_process()))
    make_run(tmp_path / "a/checkpoints/no_run_of_its_own", 1e-3, [1.0])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_list(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["list", str(runs), str(runs / "a")]) == 0
    head, *rows = lines(capsys)
    assert head == ["run", "state", "step", "loss", "held-out", "tok/s", "ranks", "last", "start", "host"]
    assert rows == [
        [str(runs / "a"), "finished", "3/3", "3", "-", "100", "2", "2026-11-30", "10:20", "n1"],
        [str(runs / "deep/er/b"), "running", "3/3", "1", "-", "100", "4", "2026-11-30", "10:20", "n1"],
    ]


def test_folders_without_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["list", str(runs / "deep"), "--depth", "1"]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert tool.main(["list", str(runs / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert tool.main(["compare", str(runs / "a"), str(runs)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_compare(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs / "a", runs / "deep/er/b"
    assert tool.main(["compare", str(first), str(second)]) == 0
    found = lines(capsys)
    assert found[:2] == [["A", str(first)], ["B", str(second)]]
    assert ["optimizer.lr", "0.001", "0.002"] in found and not any(line[:1] == ["optimizer.eps"] for line in found)
    assert not any(line[:1] == ["run_dir"] for line in found)
    assert ["ranks", "2", "4"] in found and ["versions.torch", "2.15.0", "2.14.0"] in found
    assert ["last", "loss", "3", "1"] in found and ["state", "finished", "running"] in found
    assert [line for line in found if line[:2] == ["after", "step"]] == [
        ["after", "step", "1", "5", "6"],
        ["after", "step", "2", "4", "2"],
        ["after", "step", "3", "3", "1"],
    ]


def test_compare_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["compare", str(runs / "a"), str(runs / "a")]) == 0
    out = capsys.readouterr().out
    assert "Settings that differ: nothing" in out and "Machines and versions that differ: nothing" in out


def test_a_run_that_diverged(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended at a loss that is no number, which training writes as null."""
    path = make_run(runs / "c", 1e-3, [5.0, 0.01, 0.0]) / "metrics.jsonl"
    *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows[:1], {**last, "step": 2, "loss": None})))
    assert tool.main(["list", str(runs / "c")]) == 0
    assert lines(capsys)[1][1:4] == ["diverged", "2/3", "nan"]
    page = write_report(runs / "c").read_text()
    assert "Diverged after 2 of 3 steps. Note: its loss is not finite at step 2." in page
    assert '<div class="value">not finite</div>' in page
