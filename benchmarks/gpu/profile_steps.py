"""Profiles three training steps of Qwen3-VL 2B at two row lengths: launches, idle time of the GPU, waits for it.

    python -m benchmarks.gpu.profile_steps [--dry] [--output FILE.json]

Each step has two micro-batches of one row with an image, as in the recipe.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures
from benchmarks.gpu import models, trace
from benchmarks.training_sides import build_batch, own_side
from megatron_vlm import platform
from megatron_vlm.training.setup import initialize_distributed

LENGTHS = (1024, 4096)
IMAGE_PATCHES = (32, 32)  # 256 tokens
TINY_LENGTHS, TINY_PATCHES = (24, 40), (4, 4)
MICRO_BATCHES = 2
WARM_UPS = 2  # steps in which kernels are compiled and memory is allocated
STEPS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny model on the host")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    initialize_distributed(timeout_minutes=2)
    device = platform.current().device
    dtype = torch.float32 if options.dry else torch.bfloat16
    config = models.qwen3_vl_2b(options.dry)
    found_by_length: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models.write_random(config, Path(folder), dtype, device)
        patches = TINY_PATCHES if options.dry else IMAGE_PATCHES
        for length in TINY_LENGTHS if options.dry else LENGTHS:
            batches = [build_batch(config, length, patches)] * MICRO_BATCHES
            side = own_side(Path(folder), batches, dtype)
            for _ in range(WARM_UPS):
                side.step()
            found_by_length[f"{length} tokens"] = found = profile(side.step, Path(folder) / "trace.json")
            idle = "-" if found["idle_share"] is None else f"{found['idle_share']:.0%}"
            print(f"{length} tokens: {found['launches']:.0f} launches, {idle} idle, waits {found['waits']}", flush=True)
            if options.output:
                figures.write(options.output, found_by_length)
            del side
            gc.collect()
    platform.current().leave_process_group(failed=False)
    has_launches = all(found["launches"] for found in found_by_length.values())
    return 0 if options.dry or has_launches else 1


def profile(step: Any, path: Path) -> dict[str, Any]:
    """Return figures of `STEPS` steps; the device is idle before them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    # On a GPU the host's operators are not recorded: recording them would keep the device waiting.
    with torch.profiler.profile(activities=platform.current().profiler_activities()[-1:]) as recorded:
        for _ in range(STEPS):
            step()
    recorded.export_chrome_trace(str(path))
    return trace.summarize(json.loads(path.read_text())["traceEvents"], STEPS)


if __name__ == "__main__":
    sys.exit(main())
