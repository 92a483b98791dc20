"""Run the test suite with the oldest packages that `pyproject.toml` allows, and record what came of it.

    python -m tests.lower_bounds [--requirements]

Counts and versions go to benchmarks/results/lower_bounds.json. `make test_lower_bounds` makes the environment first.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import figures, junit

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/results/lower_bounds.json"
TESTS = ("-n", "2", "--dist", "loadfile", "-m", "not full", "tests")
PACKAGES = ("torch", "torchvision", "transformers", "triton", "megatron-core", "numpy", "tokenizers")


def requirements() -> list[str]:
    """What the project and its tests need; the project itself is read from the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"]["dev"]


def check_bounds() -> None:
    """Raises SystemExit unless what runs is what `constraints_lower.txt` pins."""
    for line in (ROOT / "constraints_lower.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and importlib.metadata.version(name) != version:
            raise SystemExit(
                f"{name} is {importlib.metadata.version(name)}, not {version}: use `make test_lower_bounds`"
            )


def main(arguments: list[str]) -> int:
    """Run the tests and return pytest's exit code."""
    if arguments == ["--requirements"]:
        print("\n".join(requirements()))
        return 0
    check_bounds()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *TESTS]
        # Nothing of the project is installed there, and some tests start programs of it.
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        returncode = subprocess.run(command, cwd=ROOT, env=environment).returncode
        found = junit.read(report.read_text())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    figures.write(RECORD, {"versions": versions, "commit": figures.commit(), **found})
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
