"""Times an update of Qwen3-VL 2B by AdamW and by Muon, without a forward pass: seconds and memory.

    python -m benchmarks.gpu.optimizers [--dry] [--rounds 7] [--output FILE.json]

Parameters are bf16 and gradients random; everything is on one rank. Muon's matmuls are measured in bf16 (`medium`) and
in TF32 (`high`). `tests/gpu/test_one_gpu.py` compares its updates with the CPU's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import figures
from benchmarks.gpu import models
from benchmarks.training_sides import SETTINGS, record_of
from megatron_vlm import platform
from megatron_vlm.config import OptimizerSettings
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.setup import initialize_distributed

OPTIMIZERS = {
    "adamw": SETTINGS,
    "muon, bf16": replace(SETTINGS, name="muon"),
    "muon, tf32": replace(SETTINGS, name="muon", muon_fp32_matmul_prec="high"),
}
WARM_UPS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny model on the host")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    initialize_distributed(timeout_minutes=2)
    found = {}
    for name, settings in OPTIMIZERS.items():
        found[name] = measure(settings, options.dry, 2 if options.dry else options.rounds)
        seconds, num_bytes = found[name]["median_seconds"], found[name]["most_bytes"]
        print(f"{name:12s} {1e3 * seconds:9.2f} ms per update, {num_bytes / 2**30:.2f} GiB", flush=True)
        gc.collect()
        if options.output:
            figures.write(options.output, found)
    platform.current().leave_process_group(failed=False)
    return 0


def measure(settings: OptimizerSettings, is_tiny: bool, rounds: int) -> dict[str, float]:
    """Return the median seconds of an update, and the most memory (0 on a host)."""
    device = platform.current()
    family, model_config = record_of(models.qwen3_vl_2b(is_tiny))
    layout = Layout.over(1, num_layers=len(model_config.text.layers))
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    build = BuildSettings(layout, torch.bfloat16, whole_matrices=settings.name == "muon")
    chunks = build_chunks(family, model_config, build, groups)
    for parameter in chunks[0].parameters():
        parameter.data.normal_(0.0, 0.02)
    model = wrap_data_parallel(chunks, groups, use_distributed_optimizer=True)
    optimizer = build_optimizer(model, settings, torch.bfloat16, True, groups)
    for parameter in model[0].parameters():
        parameter.main_grad.normal_()
    seconds = []
    if device.accelerated:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UPS + rounds):
        device.synchronize()
        began = time.perf_counter()
        apply_gradients(optimizer, gradient_norm(optimizer), settings.clip_grad)
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "median_seconds": statistics.median(seconds[WARM_UPS:]),
        "most_bytes": device.peak_memory_bytes() if device.accelerated else 0,
    }


if __name__ == "__main__":
    sys.exit(main())
