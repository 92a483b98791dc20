"""`make test_full` that was stopped, or failed, goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[1]
TESTS = """
import os, pytest

broken = os.environ["BROKEN"].split()

@pytest.fixture
def held():
    yield
    assert "teardown" not in broken

@pytest.mark.parametrize("number", range(3))
def test_number(number): pass
def test_broken(): assert "test" not in broken
def test_teardown(held): pass
def test_last(): "killed" in broken and os._exit(1)
"""


@pytest.mark.full
@pytest.mark.parametrize("workers", [[], ["-n", "1", "--dist", "loadfile"]], ids=["one process", "a worker"])
def test_what_passed_is_not_run_again(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(broken: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "tests.resume", *workers]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "BROKEN": broken}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    returncode, _ = run("test teardown killed")
    assert returncode == 1
    returncode, printed = run("")
    assert returncode == 0 and "passed before, not run again: test_it.py (3)" in printed and "3 passed" in printed
    returncode, printed = run("test teardown killed")
    assert returncode == 0 and "passed before, not run again: test_it.py (6)" in printed


def test_a_change_of_any_file_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "REPOSITORY", tmp_path)
    hashes = set()
    for name, content in (("README.md", "a"), ("README.md", "b"), ("LICENSE", "b")):
        (tmp_path / name).write_text(content)
        hashes.add(figures.sources_hash([tmp_path / name]))
    assert len(hashes) == 3
