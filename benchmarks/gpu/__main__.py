"""Run the stages on one GPU, in order of what is learnt per minute, and write down what each found as soon as it ends.

    python -m benchmarks.gpu [--only STAGE ...] [--seconds 840] [--bundle gpu_bundle] [--output DIR]
    python -m benchmarks.gpu --list     # the stages and how long each is estimated to take
    python -m benchmarks.gpu --dry      # start every stage on the host, at tiny sizes

Results go to DIR/gpu_DEVICE.json (default: benchmarks/results), one entry for each stage, and all output to
DIR/gpu_DEVICE.log. A stage that passed with the present sources is not run again, so that a run that was cut short is
continued by the same command; `--again` runs it. Each stage is a process of its own with a limit, and none is started
that the rest of the time would not see to its end. `--bundle` names a folder that `make gpu_bundle` made: what it holds
is installed beside the packages of the container, offline. This file needs nothing but Python.

The exit code is 0 when every stage that was asked for has passed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import junit
from benchmarks.gpu import bundle
from benchmarks.gpu.stages import FIGURES, STAGES, Stage

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
SOURCES = ("benchmarks", "demo", "kernels", "megatron_vlm", "tests")
LIMIT_SECONDS = 120  # of a stage on a GPU
DRY_LIMIT_SECONDS = 600
LEAST_SHARE = 0.5  # of its estimate that must be left for a stage to start
TAIL_CHARACTERS = 3000


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run what is asked for and return the exit code."""
    began = time.monotonic()
    options = _parse(arguments, stages)
    if options.list:
        print(_table(stages))
        return 0
    asked = [stage for stage in stages if not options.only or stage.name in options.only]
    packages = [str(bundle.install(options.bundle, REPOSITORY))] if options.bundle else []
    device = "host" if options.dry else _device()
    if device is None:
        print("no GPU: nvidia-smi names none (--dry starts every stage on the host)", file=sys.stderr)
        return 1
    folder = options.output or (RESULTS if not options.dry else Path(tempfile.mkdtemp(prefix="gpu-dry-")))
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    results, log = Results(folder / f"gpu_{slug}.json"), folder / f"gpu_{slug}.log"
    shared = {"sources": sources_hash(), "commit": _commit(), "device": device, "versions": _versions(packages)}
    limit = DRY_LIMIT_SECONDS if options.dry else LIMIT_SECONDS
    for stage in asked:
        if not options.again and results.has_passed(stage.name, shared["sources"]):
            print(f"{stage.name}: passed before, with these sources", flush=True)
            continue
        left = options.seconds - (time.monotonic() - began)
        if left < LEAST_SHARE * stage.estimate_seconds:
            print(f"{stage.name}: not started, {left:.0f} s are left", flush=True)
            continue
        print(f"{stage.name}: {stage.purpose} ...", flush=True)
        entry = run_stage(stage, options.dry, min(limit, left), packages, log)
        results.put(stage.name, entry | shared)
        print(f"{stage.name}: {entry['status']} in {entry['seconds']:.0f} s (estimate {stage.estimate_seconds} s)")
    missing = [stage.name for stage in asked if not results.has_passed(stage.name, shared["sources"])]
    print(f"{len(asked) - len(missing)} of {len(asked)} stages passed; {results.path}")
    if missing:
        print(f"not passed: {' '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _parse(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in stages], help="these stages alone")
    parser.add_argument("--seconds", type=float, default=840, help="for all stages together (default: 840)")
    parser.add_argument("--bundle", type=Path, help="folder that `make gpu_bundle` made")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="also run stages that have passed")
    parser.add_argument("--dry", action="store_true", help="start every stage on the host; nothing is kept by default")
    parser.add_argument("--list", action="store_true", help="print the stages and their estimates")
    return parser.parse_args(arguments)


class Results:
    """The file of results, written whole after every stage.

    Raises ValueError where the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = json.loads(path.read_text())["stages"] if path.exists() else {}

    def has_passed(self, name: str, sources: str) -> bool:
        """Whether a stage has passed with these sources."""
        entry = self.stages.get(name, {})
        return entry.get("status") == "passed" and entry.get("sources") == sources

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Keep what a stage found."""
        self.stages[name] = entry
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump({"stages": self.stages}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def run_stage(stage: Stage, is_dry: bool, limit_seconds: float, packages: Sequence[str], log: Path) -> dict[str, Any]:
    """Run one stage to its end or its limit.

    Args:
        stage: what runs.
        is_dry: on the host.
        limit_seconds: after which it is ended, with all that it started.
        packages: folders that are searched for packages before the interpreter's own.
        log: to which its output is added.

    Returns:
        status ("passed", "failed", "timed out" or "unavailable"), seconds, estimate_seconds, returncode, figures, and
        the end of its output where it did not pass.
    """
    wrapper = () if is_dry else stage.wrapper
    entry: dict[str, Any] = {"estimate_seconds": stage.estimate_seconds, "seconds": 0.0}
    if wrapper and shutil.which(wrapper[0]) is None:
        return entry | {"status": "unavailable", "tail": f"{wrapper[0]} is not on the path"}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        arguments = stage.dry_command if is_dry else stage.command
        command = [*wrapper, sys.executable, *(part.replace(FIGURES, str(figures)) for part in arguments)]
        began = time.monotonic()
        returncode, output = _run(command, _environment(stage, is_dry, packages), limit_seconds)
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["figures"] = _read_figures(figures)
    with log.open("a") as file:
        file.write(f"==== {stage.name}\n{output}\n")
    status = "timed out" if returncode is None else "passed" if returncode == 0 else "failed"
    entry |= {"status": status, "returncode": returncode}
    return entry if status == "passed" else entry | {"tail": output[-TAIL_CHARACTERS:]}


def _run(command: Sequence[str], environment: dict[str, str], limit_seconds: float) -> tuple[int | None, str]:
    """Exit code, None where the limit ended it, and output."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            returncode: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            # What a stage leaves running would hold the GPU's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return returncode, output.read()


def _environment(stage: Stage, is_dry: bool, packages: Sequence[str]) -> dict[str, str]:
    paths = [*packages, str(REPOSITORY), str(REPOSITORY / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    always = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_dry:
        # A GPU that is there is not taken.
        return os.environ | always | {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS": "host", "OMP_NUM_THREADS": "1"}
    return os.environ | always | {"GPU_TESTS": "1", "MEGATRON_VLM_STRICT_KERNELS": "1", **stage.environment}


def _read_figures(path: Path) -> Any:
    """What a stage wrote: JSON, or pytest's XML as counts and the first lines of failures; None for nothing."""
    if not path.exists():
        return None
    text = path.read_text()
    return junit.read(text) if text.startswith("<?xml") else json.loads(text)


def _device() -> str | None:
    """Name of the first GPU, None without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _commit() -> str | None:
    """The checkout's, None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Of the packages that results depend on, as the stages will find them."""
    found = {"python": sys.version.partition(" ")[0]}
    for name in ("torch", "triton", "transformers", "megatron-core", "liger-kernel"):
        path = [*packages, *sys.path]
        distribution = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        found[name] = distribution.version if distribution else "not installed"
    return found


def sources_hash(repository: Path = REPOSITORY) -> str:
    """Of everything that the stages run."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((repository / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(repository)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _table(stages: Sequence[Stage]) -> str:
    lines = [f"{stage.name:<18}{stage.estimate_seconds:>5} s  {stage.purpose}" for stage in stages]
    return "\n".join([*lines, f"{'all':<18}{sum(stage.estimate_seconds for stage in stages):>5} s"])


if __name__ == "__main__":
    sys.exit(main())
