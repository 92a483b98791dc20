"""Time and memory of converting a synthetic Gemma 3 checkpoint, against copying the same bytes.

    python benchmarks/convert.py [--gigabytes 4] [--rounds 5] [--directory DIR] [--output FILE.json]

Every import and export stands between two copies (`cp -r`, then fsync of every file) of what it reads. Each begins with
its source in the page cache and all other files of this benchmark dropped from it or deleted, and the copies too begin
after the imports of torch and transformers: where a virtual machine hands free memory back to its host, the same `cp`
takes two to four times as long if it starts a few seconds later. The ratio is the median over the rounds of (time /
mean of the two copies). Time counts from when the work begins; `with start` adds the imports, which take the same time
for any size. Memory is the peak of RssAnon, sampled every 5 ms, above that of an interpreter that has only imported
torch.

Limits: both ratios at most 2, both peaks at most 2 GiB; the exit code is 1 beyond them.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_vlm.checkpoint.hf import SafetensorsWriter  # noqa: E402
from megatron_vlm.files.safetensors_headers import WeightFiles  # noqa: E402

MAX_RATIO = 2.0
MAX_EXTRA_BYTES = 2 * 2**30
SAMPLE_SECONDS = 0.005
COPY = """
import subprocess, sys, time
import torch.distributed.checkpoint, transformers
start_seconds = time.monotonic()
subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', *sys.argv[1:]], check=True)
print(f"copied in {time.monotonic() - start_seconds:.2f} s")
"""


def main() -> int:
    """Run the benchmark and return the exit code."""
    options = _parse()
    work = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=options.directory))
    try:
        source = work / "hf"
        num_bytes = write_checkpoint(source, options.gigabytes)
        print(f"{num_bytes / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards under {work}", flush=True)
        result = measure(source, work, options.rounds)
    finally:
        shutil.rmtree(work)
    result |= {"bytes": num_bytes, "torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    within = True
    for name in ("import", "export"):
        figures = result[name]
        good = figures["ratio"] <= MAX_RATIO and figures["extra_rss_anon_bytes"] <= MAX_EXTRA_BYTES
        within &= good
        print(
            f"{name}: {figures['ratio']:.2f} times cp + fsync (limit {MAX_RATIO:.1f}; with start "
            f"{figures['ratio_with_start']:.2f}), "
            f"{figures['extra_rss_anon_bytes'] / 2**20:.0f} MiB RssAnon beyond torch "
            f"(limit {MAX_EXTRA_BYTES / 2**20:.0f}): {'ok' if good else 'TOO MUCH'}"
        )
    return 0 if within else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the synthetic checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "convert.json")
    return parser.parse_args()


def write_checkpoint(directory: Path, gigabytes: float) -> int:
    """Write a random bf16 Gemma3ForConditionalGeneration checkpoint of about this size; return its bytes.

    The shapes are Gemma 3 4B's with fewer layers, but the full vocabulary and vision tower (from 2.5 GB).
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4}
    text |= {"head_dim": 256, "sliding_window": 1024, "vocab_size": 262208}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    vision |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
    if gigabytes < 2.5:
        text |= {"vocab_size": 8192}
        vision |= {"num_hidden_layers": 2}

    def build(num_layers: int) -> tuple[Gemma3Config, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        config = Gemma3Config(
            text_config=Gemma3TextConfig(**text, num_hidden_layers=num_layers),
            vision_config=SiglipVisionConfig(**vision),
            dtype="bfloat16",
            architectures=["Gemma3ForConditionalGeneration"],
        )
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(config)
        renames = {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
        }
        names = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        for old, new in (*renames.items(), ("model.multi_modal_projector.", "multi_modal_projector.")):
            names = [(new + name.removeprefix(old) if name.startswith(old) else name, shape) for name, shape in names]
        return config, [(name, torch.bfloat16, shape) for name, shape in names]

    def total_bytes(num_layers: int) -> int:
        return WeightFiles.plan(build(num_layers)[1]).num_bytes

    layer_bytes = total_bytes(2) - total_bytes(1)
    num_layers = max(1, round((gigabytes * 1e9 - total_bytes(1)) / layer_bytes) + 1)
    config, tensors = build(num_layers)
    files = WeightFiles.plan(tensors, max_shard_bytes=2_000_000_000)
    directory.mkdir()
    config.save_pretrained(directory)
    writer = SafetensorsWriter(directory, files)
    generator = torch.Generator().manual_seed(0)
    for stored in files:
        values = torch.randint(0, 2**15, stored.shape, generator=generator, dtype=torch.int16)
        writer.write(stored.name, 0, values.view(torch.bfloat16))
    writer.close()
    return files.num_bytes


def measure(source: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Run imports and exports, each between two copies; return seconds, ratios and peaks."""
    bare_bytes = run([sys.executable, "-c", "import torch"], reports_time=False).peak_bytes
    imported, exported = work / "imported", work / "exported"
    convert = [sys.executable, str(REPOSITORY / "tools" / "convert.py")]
    steps = {
        "import": (source, [*convert, "import", "--hf", str(source), "--out", str(imported)]),
        "export": (
            imported,
            [*convert, "export", "--ckpt", str(imported), "--hf", str(source), "--out", str(exported)],
        ),
    }
    results: dict[str, list[tuple[Run, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, (read_from, command) in steps.items():
            before_seconds = copy_seconds(read_from, work)
            keep_in_page_cache(read_from, work)
            result = run(command)
            after_seconds = copy_seconds(read_from, work)
            results[name].append((result, (before_seconds + after_seconds) / 2))
            copies = f"copies {before_seconds:.2f} s, {after_seconds:.2f} s"
            print(f"  round {number + 1} {name}: {result}; {copies}", flush=True)
        for path in source.iterdir():
            if not filecmp.cmp(path, exported / path.name, shallow=False):
                raise SystemExit(f"{path.name} came back changed")
        shutil.rmtree(imported)
        shutil.rmtree(exported)
    return {name: _figures(pairs, bare_bytes) for name, pairs in results.items()}


def copy_seconds(directory: Path, work: Path) -> float:
    """Copy a directory, sync the copy to disk, delete it, and return the seconds of copy and sync."""
    keep_in_page_cache(directory, work)
    copied = work / "copied"
    seconds = run([sys.executable, "-c", COPY, str(directory), str(copied)]).work_seconds
    shutil.rmtree(copied)
    return seconds


def _figures(pairs: list[tuple[Run, float]], bare_bytes: int) -> dict[str, Any]:
    return {
        "seconds": [result.work_seconds for result, _ in pairs],
        "seconds_with_start": [result.seconds for result, _ in pairs],
        "copy_seconds": [seconds for _, seconds in pairs],
        "ratio": statistics.median(result.work_seconds / seconds for result, seconds in pairs),
        "ratio_with_start": statistics.median(result.seconds / seconds for result, seconds in pairs),
        "extra_rss_anon_bytes": max(result.peak_bytes for result, _ in pairs) - bare_bytes,
    }


@dataclass(frozen=True)
class Run:
    """Duration of a process, the duration that it reports for its work, and the peak of its RssAnon."""

    seconds: float
    work_seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.work_seconds:.2f} s ({self.seconds:.2f} s with start), RssAnon {self.peak_bytes / 2**20:.0f} MiB"


def run(command: list[str], reports_time: bool = True) -> Run:
    """Run a command and sample its memory; unless it `reports_time`, all of its time counts as work."""
    start_seconds = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, _rss_anon_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - start_seconds
    printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    reported = re.search(r" in ([0-9.]+) s$", printed.strip())
    if reports_time and reported is None:
        raise SystemExit(f"{' '.join(command)} does not say how long its work took")
    return Run(seconds, float(reported[1]) if reported else seconds, peak_bytes)


def _rss_anon_bytes(process_id: int) -> int:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:  # it has just ended
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def keep_in_page_cache(directory: Path, work: Path) -> None:
    """Read `directory` into the page cache; write back and drop everything else under `work`."""
    os.sync()
    for path in work.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as stream:
                if path.is_relative_to(directory):
                    while stream.read(2**20):
                        pass
                else:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
