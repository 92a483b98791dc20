"""Time of one training step (forward, backward, clip, AdamW) on one CPU process, against plain transformers.

    python benchmarks/train_step.py [--models dense moe] [--rounds 9] [--threads 2] [--profile] [--output FILE.json]

A mid-size Qwen3-VL, dense and with experts, in fp32: the same weights, the same row (one image and text, 1,024 tokens,
no padding), the same number of threads, in one process. Losses are compared first. Then the two sides take turns, and
the side that begins changes from round to round; the ratio is that of the median seconds. Both update their weights.

transformers: `from_pretrained`, its default attention and grouped experts, the loss of its own forward pass,
`clip_grad_norm_`, `torch.optim.AdamW(fused=True)`, `zero_grad(set_to_none=True)`. Ours: what a rank of a run does in a
step with the default settings (distributed optimizer, fp32 main gradients), but for precision fp32, where bf16 is the
default, learning rate 1e-4 and weight decay 0.1. Data loading does not count on either side.

Limit: both ratios at most 1; the exit code is 1 beyond it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform as machine
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLMoeConfig

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.training_sides import Side, build_batch, own_side, transformers_side  # noqa: E402
from megatron_vlm import platform  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "train_step.json"
MODELS = ("dense", "moe")
MAX_RATIO = 1.0
MAX_LOSS_DIFFERENCE = 1e-5
# After an update: Adam's first step is the sign of a gradient, also of one that is rounding noise.
MAX_LATER_LOSS_DIFFERENCE = 1e-3
SEQUENCE_TOKENS = 1024
IMAGE_PATCHES = (32, 32)  # 512 x 512 pixels, 256 tokens
SPECIAL_TOKENS = {
    "image_token_id": 31995,
    "video_token_id": 31996,
    "vision_start_token_id": 31997,
    "vision_end_token_id": 31998,
}

VISION = {
    "depth": 6,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_heads": 6,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [1, 3],
}
TEXT = {
    "vocab_size": 32000,
    "num_hidden_layers": 8,
    "head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]},
}
DENSE = {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4}
MOE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
}


def main() -> int:
    """Run the benchmark and return the exit code."""
    options = _parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    backend = platform.initialize().backend
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    results = {}
    with tempfile.TemporaryDirectory(prefix="train-step-benchmark-") as work:
        for name in options.models:
            sides = build_sides(name == "moe", Path(work) / name)
            results[name] = measure(sides, options.rounds, options.profile)
            print(_line(name, results[name]), flush=True)
            del sides
            gc.collect()
    torch.distributed.destroy_process_group()
    figures = {"models": results, "limit": MAX_RATIO, "tokens": SEQUENCE_TOKENS, "dtype": "float32"} | environment()
    output = options.output or RESULTS
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(result["ratio"] <= MAX_RATIO for result in results.values()) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=9, help="at least 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the time of one step of each side goes")
    parser.add_argument("--output", type=Path, help=f"default with all models: {RESULTS.relative_to(REPOSITORY)}")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    if options.output is None and set(options.models) != set(MODELS):
        parser.error(
            f"--models {' '.join(options.models)} needs --output: {RESULTS.name} keeps the figures of all models"
        )
    return options


def build_sides(moe: bool, folder: Path) -> list[Side]:
    """Build transformers' trainer and ours, from the same weights on the same batch."""
    torch.manual_seed(1)
    text = TEXT | (MOE if moe else DENSE)
    config_class: Any = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    config = config_class(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": text["hidden_size"]},
        **SPECIAL_TOKENS,
        tie_word_embeddings=not moe,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    batches = [build_batch(config, SEQUENCE_TOKENS, IMAGE_PATCHES)]
    return [transformers_side(folder, batches, torch.float32), own_side(folder, batches, torch.float32)]


def measure(sides: list[Side], rounds: int, profile: bool) -> dict[str, Any]:
    """Run steps of both sides in turn; return their seconds, the ratio, and the losses of the first steps."""
    first_losses = [[side.step() for _ in range(2)] for side in sides]
    difference, later = (abs(ours - theirs) for theirs, ours in zip(*first_losses, strict=True))
    if difference > MAX_LOSS_DIFFERENCE or later > MAX_LATER_LOSS_DIFFERENCE:
        raise SystemExit(f"losses differ by {difference:.1e}, after an update by {later:.1e}: {first_losses}")
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            began = time.perf_counter()
            side.step()
            seconds[side.name].append(time.perf_counter() - began)
    if profile:
        for side in sides:
            print_profile(side)
    theirs, ours = (statistics.median(seconds[side.name]) for side in sides)
    return {
        "ratio": ours / theirs,
        "ratios_by_round": [b / a for a, b in zip(*seconds.values(), strict=True)],
        "seconds": seconds,
        "first_losses": dict(zip(seconds, first_losses, strict=True)),
        "loss_difference": difference,
    }


def print_profile(side: Side) -> None:
    """Profile one step and print its operators by their self time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        side.step()
    print(f"\n{side.name}")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=50))


def environment() -> dict[str, Any]:
    """Return what the figures depend on: hardware, versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        machine.processor(),
    )
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": processor,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def _line(name: str, result: dict[str, Any]) -> str:
    (their_name, theirs), (own_name, ours) = result["seconds"].items()
    spread = sorted(result["ratios_by_round"])
    return (
        f"{name}: {own_name} {statistics.median(ours):.2f} s, {their_name} {statistics.median(theirs):.2f} s: "
        f"{result['ratio']:.3f} times (by round {spread[0]:.3f} to {spread[-1]:.3f}; limit {MAX_RATIO}); "
        f"losses differ by {result['loss_difference']:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
