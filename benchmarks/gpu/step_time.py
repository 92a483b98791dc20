"""Times training steps of models that fit on one GPU, in turn with transformers: seconds, MFU, memory.

    python -m benchmarks.gpu.step_time [--dry] [--rounds 7] [--output FILE.json]

Qwen3-VL 2B runs on rows of 4,096 tokens with an image of 1,024, and Gemma 3 1B on 4,096 tokens of text: two
micro-batches of one full row per step, without padding and recomputation, with the same weights on both sides.
transformers uses Liger's kernels, as Liger chooses them, where Liger supports this transformers (0.8.5 supports 5.17
and not 5.23), and holds everything in bf16, Adam's moments too; here gradients, main weights and moments are fp32, as
in every run: more bytes for the same step. Losses are compared first. Sides take turns and the one that begins changes;
figures are medians. MFU is the model FLOPs (`ModelFlops`) over the dense bf16 peak of the data sheet.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks import figures
from benchmarks.gpu import models
from benchmarks.training_sides import Side, build_batch, own_side, record_of, transformers_side
from megatron_vlm import platform
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.flops import ModelFlops
from megatron_vlm.training.setup import initialize_distributed

LENGTH, TINY_LENGTH = 4096, 40
MODELS = {  # with height and width in patches of an image, or None
    "qwen3_vl_2b": (models.qwen3_vl_2b, (64, 64), (4, 4)),
    "gemma3_1b": (models.gemma3_1b, None, None),
}
MICRO_BATCHES = 2
WARM_UPS = 2
# Mean losses over thousands of labels, each from bf16 activations that the sides round at different points.
MAX_LOSS_DIFFERENCE = 5e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny models on the host, without Liger")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    initialize_distributed(timeout_minutes=2)
    models_found: dict[str, Any] = {}
    for name, (config_of, patches, tiny_patches) in MODELS.items():
        try:
            models_found[name] = measure(
                config_of(options.dry),
                TINY_LENGTH if options.dry else LENGTH,
                tiny_patches if options.dry else patches,
                2 if options.dry else options.rounds,
                with_liger=not options.dry,
            )
        except Exception as error:  # whatever it is, the next model is measured all the same
            models_found[name] = {"error": f"{type(error).__name__}: {error}"}
        print(_line(name, models_found[name]), flush=True)
        gc.collect()  # frees both sides, which hold reference cycles
        if options.output:
            figures.write(options.output, models_found)
    platform.current().leave_process_group(failed=False)
    return 1 if any("error" in found for found in models_found.values()) else 0


def measure(
    config: PretrainedConfig, length: int, patches: tuple[int, int] | None, rounds: int, with_liger: bool
) -> dict[str, Any]:
    """Return seconds, memory and MFU of both sides on one model."""
    device = platform.current().device
    dtype = torch.bfloat16 if platform.current().accelerated else torch.float32
    batches = [build_batch(config, length, patches)] * MICRO_BATCHES
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models.write_random(config, folder, dtype, device)
        sides, first, held = [], {}, {}
        for make in (partial(transformers_side, with_liger=with_liger), own_side):
            before = _synchronize()
            side = make(folder, batches, dtype)
            sides.append(side)
            first[side.name] = side.step()
            held[side.name] = _synchronize() - before
    for side in sides:
        for _ in range(WARM_UPS - 1):
            side.step()
    seconds, peaks = _take_turns(sides, rounds)
    family, model_config = record_of(config)
    counted = ModelFlops(family, model_config, Trainable([]), build_groups(Layout()))
    flops = MICRO_BATCHES * counted.of(counted.lengths(batches[0]))
    peak_flops = platform.current().peak_flops()
    found: dict[str, Any] = {
        "tokens": MICRO_BATCHES * length,
        "flops": flops,
        "first_losses": first,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "bytes_between_steps": held,
        "most_bytes_in_a_step": {name: held[name] + peaks[name] for name in peaks},
    }
    theirs, ours = found["median_seconds"].values()
    found["ratio"] = theirs / ours
    found["mfu"] = {
        name: flops / time / peak_flops if peak_flops else None for name, time in found["median_seconds"].items()
    }
    losses = list(first.values())
    if not abs(losses[0] - losses[1]) <= MAX_LOSS_DIFFERENCE * abs(losses[0]):
        found["error"] = f"losses differ: {first}"
    return found


def _take_turns(sides: list[Side], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step by side, and the peak memory of a step beyond what is allocated between steps."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks = dict.fromkeys(seconds, 0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            held = _synchronize()
            began = time.perf_counter()
            side.step()
            _synchronize()
            seconds[side.name].append(time.perf_counter() - began)
            if torch.cuda.is_available():
                peaks[side.name] = max(peaks[side.name], torch.cuda.max_memory_allocated() - held)
                torch.cuda.reset_peak_memory_stats()
    return seconds, peaks


def _synchronize() -> int:
    """Wait for the device and return the bytes that are allocated on it."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _line(name: str, found: dict[str, Any]) -> str:
    if "seconds" not in found:
        return f"{name}: {found['error']}"
    parts = [
        f"{side} {seconds:.3f} s" + (f" (MFU {found['mfu'][side]:.1%})" if found["mfu"][side] else "")
        for side, seconds in found["median_seconds"].items()
    ]
    return f"{name}: {', '.join(parts)}; {found['ratio']:.2f} times as fast; {found.get('error', 'losses agree')}"


if __name__ == "__main__":
    sys.exit(main())
