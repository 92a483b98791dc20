"""Run the stages on one GPU, in order of what is learnt per minute, and save what each found as soon as it ends.

    python -m benchmarks.gpu [--only STAGE ...] [--seconds 840] [--bundle gpu_bundle] [--output DIR]
    python -m benchmarks.gpu --list     # the stages and how long each is estimated to take
    python -m benchmarks.gpu --dry      # start every stage on the host, at tiny sizes

Results go to DIR/gpu_DEVICE.json (default: benchmarks/results), one entry for each stage, and all output to
DIR/gpu_DEVICE.log. A stage that passed with the present sources is not run again, so that the same command continues a
run that was cut short; `--again` runs it. Each stage is a process of its own with a limit, and none is started when
less than half of its estimate is left. `--bundle` names a folder that `make gpu_bundle` made: its packages are
installed beside those of the container, offline. This file needs nothing but Python.

The exit code is 0 when every stage that was asked for has passed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, junit
from benchmarks.gpu import bundle
from benchmarks.gpu.stages import FIGURES, STAGES, Stage

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
SOURCES = ("benchmarks", "demo", "kernels", "megatron_vlm", "tests")
DRY_LIMIT_SECONDS = 600  # limit of a stage on the host
LEAST_SHARE = 0.5  # fraction of its estimate that must be left for a stage to start: estimates are generous
SECONDS_TO_REPORT = 8.0  # time that a stage has for its report after its limit
TAIL_CHARACTERS = 3000


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run what is asked for and return the exit code."""
    began = time.monotonic()
    options = _parse(arguments, stages)
    if options.list:
        print(_table(stages))
        return 0
    asked = [stage for stage in stages if not options.only or stage.name in options.only]
    packages = []
    if options.bundle:
        packages = [str(bundle.install(options.bundle, REPOSITORY))]
        atexit.register(shutil.rmtree, packages[0], ignore_errors=True)
    device = "host" if options.dry else _device()
    if device is None:
        print("no GPU: nvidia-smi names none (--dry starts every stage on the host)", file=sys.stderr)
        return 1
    folder = options.output or (RESULTS if not options.dry else Path(tempfile.mkdtemp(prefix="gpu-dry-")))
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    results, log = Results(folder / f"gpu_{slug}.json"), folder / f"gpu_{slug}.log"
    shared = {
        "sources": figures.sources_hash(sources()),
        "commit": figures.commit(),
        "device": device,
        "versions": _versions(packages),
    }
    # Exit through `finally` blocks, so that the running stage is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Stages that have not run come before those that have failed.
    for stage in sorted(asked, key=lambda stage: results.status(stage.name, shared) is not None):
        if not options.again and results.status(stage.name, shared) == "passed":
            print(f"{stage.name}: passed before, with these sources and packages", flush=True)
            continue
        left = options.seconds - (time.monotonic() - began)
        if left < LEAST_SHARE * stage.estimate_seconds:
            print(f"{stage.name}: not started, {left:.0f} s are left", flush=True)
            continue
        print(f"{stage.name}: {stage.purpose} ...", flush=True)
        limit = DRY_LIMIT_SECONDS if options.dry else stage.limit_seconds
        entry = run_stage(stage, options.dry, min(limit, left), packages, log)
        results.put(stage.name, entry | shared)
        print(
            f"{stage.name}: {entry['status']} in {entry['seconds']:.0f} s (estimate {stage.estimate_seconds} s)",
            flush=True,
        )
    missing = [stage.name for stage in asked if results.status(stage.name, shared) != "passed"]
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
    """The file of results, rewritten after every stage. Raises SystemExit where it holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.stages = json.loads(path.read_text())["stages"]
            except (ValueError, KeyError, TypeError):
                raise SystemExit(f"{path} holds no results of stages; move it, or name another --output") from None

    def status(self, name: str, setting: dict[str, Any]) -> str | None:
        """Return how a stage ended with these sources, packages and device; None where it has not run with them."""
        entry = self.stages.get(name, {})
        is_same = all(entry.get(key) == setting[key] for key in ("sources", "versions", "device"))
        return entry.get("status") if is_same else None

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Save what a stage found."""
        self.stages[name] = entry
        figures.write(self.path, {"stages": self.stages})


def run_stage(stage: Stage, is_dry: bool, limit_seconds: float, packages: Sequence[str], log: Path) -> dict[str, Any]:
    """Run one stage to its end or its limit.

    Args:
        stage: the stage to run.
        is_dry: run it on the host.
        limit_seconds: time after which it is ended, with all processes that it started.
        packages: folders that are searched for packages before the interpreter's own.
        log: file to which its output is appended.

    Returns:
        The stage's result: status ("passed", "failed", "timed out" or "unavailable"), seconds, estimate_seconds,
        returncode, figures, and the end of its output where it did not pass.
    """
    wrapper = () if is_dry else stage.wrapper
    entry: dict[str, Any] = {"estimate_seconds": stage.estimate_seconds, "seconds": 0.0}
    if wrapper and shutil.which(wrapper[0]) is None:
        return entry | {"status": "unavailable", "tail": f"{wrapper[0]} is not on the path"}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures"
        arguments = stage.dry_command if is_dry else stage.command
        command = [*wrapper, sys.executable, *(part.replace(FIGURES, str(written)) for part in arguments)]
        began = time.monotonic()
        returncode, output = _run(command, _environment(stage, is_dry, packages), limit_seconds)
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["figures"] = _read_figures(written)
    with log.open("a") as file:
        file.write(f"==== {stage.name}\n{output}\n")
    status = "timed out" if returncode is None else "passed" if returncode == 0 else "failed"
    entry |= {"status": status, "returncode": returncode}
    return entry if status == "passed" else entry | {"tail": output[-TAIL_CHARACTERS:]}


def _run(command: Sequence[str], environment: dict[str, str], limit_seconds: float) -> tuple[int | None, str]:
    """Exit code of a command, None where the limit ended it, and its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores interrupts, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        returncode: int | None = None
        try:
            returncode = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            # An interrupted pytest reports what it has.
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_REPORT)
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
        # The host's GPU, if there is one, stays hidden.
        return os.environ | always | {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS": "host", "OMP_NUM_THREADS": "1"}
    return os.environ | always | {"GPU_TESTS": "1", "MEGATRON_VLM_STRICT_KERNELS": "1", **stage.environment}


def _read_figures(path: Path) -> Any:
    """What a stage wrote: JSON, or pytest's XML as counts and first lines of failures; None if incomplete."""
    if not path.exists():
        return None
    text = path.read_text()
    try:
        return junit.read(text) if text.startswith("<?xml") else json.loads(text)
    except (ValueError, SyntaxError):  # raised for JSON; for XML
        return None


def _device() -> str | None:
    """Name of the first GPU, None without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that results depend on, as the stages will import them."""
    found = {"python": sys.version.partition(" ")[0]}
    for name in ("torch", "triton", "transformers", "megatron-core", "liger-kernel", "transformer-engine"):
        path = [*packages, *sys.path]
        distribution = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        found[name] = distribution.version if distribution else "not installed"
    return found


def sources() -> Iterator[Path]:
    """Yield all source files that the stages run."""
    for folder in SOURCES:
        yield from (path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h"))


def _table(stages: Sequence[Stage]) -> str:
    lines = [f"{stage.name:<18}{stage.estimate_seconds:>5} s  {stage.purpose}" for stage in stages]
    return "\n".join([*lines, f"{'all':<18}{sum(stage.estimate_seconds for stage in stages):>5} s"])


if __name__ == "__main__":
    sys.exit(main())
