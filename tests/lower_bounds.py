"""Run the test suite with the oldest packages that `pyproject.toml` allows, and record what came of it.

    python -m tests.lower_bounds [pytest's arguments ...]

Counts and versions go to benchmarks/results/lower_bounds.json. `make test_lower_bounds` makes the environment first.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import junit

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/results/lower_bounds.json"
PACKAGES = ("torch", "torchvision", "transformers", "triton", "megatron-core", "numpy", "tokenizers")


def requirements() -> list[str]:
    """What the project and its tests need; the project itself is read from the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"]["dev"]


def main(arguments: list[str]) -> int:
    """Run the tests and return pytest's exit code."""
    if arguments == ["--requirements"]:
        print("\n".join(requirements()))
        return 0
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        returncode = subprocess.run(command, cwd=ROOT).returncode
        found = junit.read(report.read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "arguments": arguments,
        "commit": commit.stdout.strip(),
        **found,
    }
    RECORD.write_text(json.dumps(result, indent=2) + "\n")
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
