"""What packing saves: the same samples in rows of their own, in packed rows, and in long ones over context ranks.

    python benchmarks/packing.py [counted] [measured] [--output FOLDER]

counted: for two recipes and 288 samples of lognormal lengths (median 600 tokens, sigma 1, at most 4,096; 83 of them
with an image of 256 tokens), which fill a step of 64 packed rows to 99.7 %, the planner's traces say what micro-batches
compute, launch, send and keep, and its clock predicts the time of the step. Nothing runs.

measured: training steps of the demo's tiny Gemma 3 on this machine's CPU, the same rows of the data unpacked and
packed in turn.

Nothing is measured on a GPU. Results go to packing_counts.json and packing_speed.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks import packing_counts, packing_speed  # noqa: E402
from benchmarks.figures import commit, write  # noqa: E402
from megatron_vlm import platform  # noqa: E402
from tests.test_recipes import recipe, record  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
RECIPES = ("qwen3_vl_30b_a3b", "gemma3_27b")
PARTS = ("counted", "measured")


def main() -> int:
    """Run the parts, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: both")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: results)")
    options = parser.parse_args()
    parts = options.parts or PARTS
    torch.set_num_threads(1)
    if "counted" in parts:
        write(options.output / "packing_counts.json", _counted())
    if "measured" in parts:
        write(options.output / "packing_speed.json", packing_speed.measure())
    return 0


def _counted() -> dict[str, Any]:
    platform.initialize("cpu")
    results: dict[str, Any] = {"commit": commit(), "gpu": packing_counts.GPU, "seed": packing_counts.SEED}
    for name in RECIPES:
        family, model_config, _ = record(name)
        config, layout, _ = recipe(name)
        model = packing_counts.Model(config, family, model_config, layout.world_size)
        samples = packing_counts.make_samples(model, packing_counts.sample_lengths())
        rows = {case.title: packing_counts.count(model, case, samples) for case in packing_counts.CASES}
        results[name] = rows
        print("\n".join(_table(name, rows)), flush=True)
    return results


# Heading, figure, and how it is shown.
Column = tuple[str, Callable[[Mapping[str, Any]], float], str]
COLUMNS: tuple[Column, ...] = (
    ("GPUs", lambda row: row["gpus"], ".0f"),
    ("micro-batches", lambda row: row["micro_batches_per_data_rank"], ".0f"),
    ("padding", lambda row: row["padding_share"], ".1%"),
    ("own FLOPs", lambda row: row["model_flops"] / row["flops"], ".0%"),
)
# The same, of which ratios to the first row are shown, too.
COMPARED: tuple[Column, ...] = (
    ("positions", lambda row: row["positions"], ",.0f"),
    ("PFLOP", lambda row: row["flops"] / 1e15, ",.1f"),
    ("launches", lambda row: row["launches_per_rank"], ",.0f"),
    ("sent GiB", lambda row: sum(row["sent_bytes_per_rank"].values()) / 2**30, ",.1f"),
    ("context GiB", lambda row: row["sent_bytes_per_rank"].get("context", 0) / 2**30, ",.1f"),
    ("peak GiB", lambda row: row["peak_activation_bytes"] / 2**30, ",.1f"),
    ("GPU-seconds", lambda row: row["gpus"] * row["step_seconds"], ",.1f"),
    ("with waits", lambda row: row["gpus"] * row["waited_seconds"], ",.1f"),
)


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Format the figures of a recipe, and the ratios to the first row."""
    first = next(iter(rows.values()))
    pairs = ", ".join(f"{count:,} ({window})" for window, count in first["pairs"].items())
    yield f"\n{name}: {first['samples']} samples, {first['tokens']:,} tokens, {first['images']} images, pairs {pairs}"
    yield " " * 21 + "".join(f"{heading:>15}" for heading, *_ in (*COLUMNS, *COMPARED))
    for title, row in rows.items():
        yield f"{title:21}" + "".join(f"{figure(row):15{form}}" for _, figure, form in (*COLUMNS, *COMPARED))
    yield "against the first row"
    for title, row in rows.items():
        ratios = (f"{figure(row) / figure(first):.2f}" if figure(first) else "" for _, figure, _ in COMPARED)
        yield f"{title:21}" + " " * 15 * len(COLUMNS) + "".join(f"{ratio:>15}" for ratio in ratios)


if __name__ == "__main__":
    sys.exit(main())
