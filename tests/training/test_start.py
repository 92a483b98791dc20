"""What a start says and keeps."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_vlm.report.run_report import write_report
from megatron_vlm.training import start
from tests.ranks import run_ranks
from tests.training.loop_run import Place, build_place, train_here


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def said_by(arguments: list[str]) -> str:
    """On a rank: what a start prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        outcome = train_here(arguments)
    assert outcome.error is None, outcome.error
    return printed.getvalue()


def test_banner_and_record(place: Place, tmp_path: Path) -> None:
    """In a new run, a resumed one, and one that is finished."""
    settings = ["train.train_iters=2", "model.freeze=[vision_tower]", "checkpoint.save_interval=1"]
    said = []
    for more in (["train.exit_interval=1"], [], []):
        said += run_ranks(1, said_by, place.arguments(tmp_path, *settings, *more))
    for text in said:
        assert re.search(r"^megatron_vlm \d.*, torch \d.*, megatron-core \d.*, transformers \d.*, python 3", text, re.M)
        assert re.search(r"^device    1 x CPU on 1 node$", text, re.M)
        assert re.search(r"^model     .*: gemma3, with images, [\d.]+ M parameters, [\d.]+ M trained$", text, re.M)
        assert re.search(r"^data      train: train \d+ rows$", text, re.M)
        assert re.search(r"^schedule  2 steps of 4 rows = [\d.]+ passes; adamw, lr .* constant", text, re.M)
        assert str(tmp_path) in text
    assert re.search(r"^saved step 1 in [\d.]+ s$", said[0], re.M)
    assert "resuming after step 1 of 2" in said[1] and "finished" not in said[1]
    assert "this run is finished: nothing is left to train" in said[2]
    records = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [record["after_step"] for record in records] == [0, 1, 2]
    assert [record["config"]["train"]["exit_interval"] for record in records] == [1, None, None]
    assert all(record["versions"]["torch"] and record["host"] and record["command"] for record in records)
    report = write_report(tmp_path).read_text()
    assert "Finished: 2 of 2 steps." in report and report.count(f"<td>{records[0]['host']}</td>") == 3
    assert "after step 1: train.exit_interval 1 -&gt; null" in report


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Git's own answer; none outside a checkout."""
    root = Path(start.__file__).resolve().parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        commit = start._commit()
        assert commit is not None and head.stdout.startswith(commit.removesuffix("+"))
    monkeypatch.setattr(start, "__file__", str(tmp_path / "a" / "b" / "start.py"))
    assert start._commit() is None
