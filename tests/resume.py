"""Lets `make test_full` go on where it was stopped: what passed with these sources and packages is not run again.

A plugin of pytest, `-p tests.resume`. Names of tests that passed are written down as soon as they have, in
`.pytest_cache`; `--cache-clear` forgets them.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures


def pytest_configure(config: pytest.Config) -> None:
    """In each process: the one that hands out tests tells the others what they leave out."""
    worker = getattr(config, "workerinput", None)
    config.pluginmanager.register(Record(config) if worker is None else LeaveOut(worker["passed_before"]))


class LeaveOut:
    """Deselects tests by their names."""

    def __init__(self, passed_before: list[str]) -> None:
        self.passed_before = frozenset(passed_before)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep what is to run."""
        left_out = [item for item in items if item.nodeid in self.passed_before]
        items[:] = [item for item in items if item.nodeid not in self.passed_before]
        config.hook.pytest_deselected(items=left_out)


class Record(LeaveOut):
    """Reads and writes which tests have passed."""

    def __init__(self, config: pytest.Config) -> None:
        assert config.cache is not None
        folder = config.cache.mkdir("passed")
        self.path = folder / _state()
        for other in folder.iterdir():
            if other != self.path:
                other.unlink()
        super().__init__(self.path.read_text().splitlines() if self.path.exists() else [])
        self.file = self.path.open("a", buffering=1)
        self.called: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Of pytest-xdist, before a worker starts."""
        node.workerinput["passed_before"] = sorted(self.passed_before)

    def pytest_report_header(self) -> list[str]:
        """One line for each file of which something is left out."""
        files = Counter(name.partition("::")[0] for name in self.passed_before)
        return [f"passed before, not run again: {file} ({number})" for file, number in sorted(files.items())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has passed once its fixtures are gone without an error."""
        if report.passed and report.when == "call":
            self.called.add(report.nodeid)
        if report.passed and report.when == "teardown" and report.nodeid in self.called:
            self.file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Nothing left to run is no failure."""
        self.file.close()
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed_before:
            session.exitstatus = pytest.ExitCode.OK


def _state() -> str:
    """A hash of all files that git does not ignore, and of all installed packages."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=figures.REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [path for name in listed.split("\0") if name and (path := Path(figures.REPOSITORY / name)).is_file()]
    packages = sorted(f"{package.name} {package.version}" for package in distributions())
    return hashlib.sha256("\n".join([figures.sources_hash(paths), *packages]).encode()).hexdigest()
