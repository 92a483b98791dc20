"""Training steps of the demo's tiny Gemma 3 on this machine's CPU: the same rows of the data unpacked and packed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pretrain_vlm
from benchmarks.figures import commit
from demo import draw, gemma3
from demo.dataset import IMAGES, chat_row
from demo.recipes import LEARNED_TOKENS
from megatron_vlm.cli import load_config
from megatron_vlm.data.packing import best_fit_decreasing
from megatron_vlm.data.rows import reader_for
from megatron_vlm.families import registry

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS, STEPS, REPETITIONS, SEED = 320, 5, 3, 2  # 65 packed rows, 13 in each step
ROW_TOKENS = 512
TURNS_MEDIAN, TURNS_SIGMA, MOST_TURNS = 4.0, 1.0, 24


@dataclass(frozen=True)
class Side:
    """One way to train on the rows: a whole pass in `STEPS` steps."""

    name: str
    packing: bool
    micro_batch_size: int


SIDES = (Side("unpacked, one row", False, 1), Side("unpacked, four rows", False, 4), Side("packed", True, 1))


def write_rows(folder: Path) -> Path:
    """Write chats of lognormally many questions, every second one about an image; returns the file."""
    rng, turns = random.Random(SEED), np.random.default_rng(SEED)
    (folder / "images").mkdir(parents=True)
    counts = np.clip(turns.lognormal(np.log(TURNS_MEDIAN), TURNS_SIGMA, ROWS).round(), 1, MOST_TURNS).astype(int)
    scenes, rows = draw.all_scenes(), []
    for number, count in enumerate(counts.tolist()):
        scene = rng.choice(scenes)
        media: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        if number % 2:
            path = f"images/{number:05d}.png"
            draw.render(scene, rng).save(folder / path)
            media[0] = [{"type": "image", "image": path}]
        kinds = [rng.choice(list(draw.QUESTIONS)) for _ in range(count)]
        rows.append(
            chat_row([(m, rng.choice(draw.QUESTIONS[k]), scene.answer(k)) for m, k in zip(media, kinds, strict=True)])
        )
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_data(folder: Path) -> tuple[Path, Path]:
    """Write the demo's tiny Gemma 3 and the rows; returns the model's directory and the file of the rows."""
    processor = gemma3.build_processor(gemma3.train_tokenizer(IMAGES.texts(), LEARNED_TOKENS))
    gemma3.build_model_directory(folder / "model", processor, SEED)
    return folder / "model", write_rows(folder / "data")


def arguments(side: Side, global_batch_size: int, run_dir: Path, model: Path, rows: Path) -> list[str]:
    """Return the command line of one pass over the rows."""
    settings = {
        "config": REPOSITORY / "configs" / "demo_gemma3.yaml",
        "run_dir": run_dir,
        "model.hf_path": model,
        "parallel.tensor_model_parallel_size": 1,
        "data.train": f"[{{path: {rows}}}]",
        "data.valid": "[]",
        "data.seq_length": ROW_TOKENS,
        "data.packing": str(side.packing).lower(),
        "train.train_iters": STEPS,
        "train.global_batch_size": global_batch_size,
        "train.micro_batch_size": side.micro_batch_size,
        "train.eval_interval": "null",
        "train.log_interval": 1,
        "optimizer.warmup_iters": 1,
        "checkpoint.export_hf": "null",
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def train(side: Side, command: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """Train as `pretrain_vlm.py` does, in this process; returns the metrics of the steps."""
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        code = pretrain_vlm.main(command)
    if code:
        raise SystemExit(f"training of {side.name!r} ended with exit code {code}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def count_packed_rows(command: list[str]) -> int:
    """Return how many packed rows one pass has; its samples are encoded for that."""
    config = load_config(command)
    hf_config = registry.load_hf_config(config.model.hf_path)
    family = registry.detect(hf_config)
    rules = family.prompt_rules(family.config_from_hf(hf_config, text_only=False))
    reader = reader_for(config, config.data.train, rules)
    lengths = np.array([len(reader.read(0, number).sample.input_ids) for number in range(ROWS)])
    return len(best_fit_decreasing(lengths, ROW_TOKENS))


def measure() -> dict[str, Any]:
    """Train each side in turn, print and return the figures."""
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, rows = build_data(folder)
        num_packed = count_packed_rows(arguments(SIDES[-1], STEPS, folder / "counted", model, rows))
        assert num_packed % STEPS == 0, f"{num_packed} packed rows are no {STEPS} equal steps"
        for repetition in range(REPETITIONS):
            for side in SIDES if repetition % 2 == 0 else reversed(SIDES):
                run_dir = folder / f"{side.name.replace(' ', '_')}_{repetition}"
                size = (num_packed if side.packing else ROWS) // STEPS
                steps = train(side, arguments(side, size, run_dir, model, rows), run_dir)
                runs[side.name].append(_figures(steps))
    check_same(runs)
    for side in SIDES:
        print(_line(side.name, runs[side.name], runs[SIDES[0].name]))
    environment = {"torch": torch.__version__, "cores": os.cpu_count(), "commit": commit()}
    return {**environment, "rows": ROWS, "row_tokens": ROW_TOKENS, "packed_rows": num_packed, "runs": runs}


def check_same(runs: Mapping[str, list[dict[str, float]]]) -> None:
    """Raise unless every run had the same samples, tokens and labels."""
    for key in ("samples", "tokens", "label_tokens", "images"):
        found = {run[key] for of_side in runs.values() for run in of_side}
        if len(found) != 1:
            raise SystemExit(f"{key} differ between the runs: {sorted(found)}")


def _figures(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Return the counts of all steps, and the rates of those behind the first."""
    counts = {key: sum(step[key] for step in steps) for key in ("tokens", "label_tokens", "padded_tokens", "images")}
    steady = steps[1:]
    seconds = sum(step["step_seconds"] for step in steady)
    return {
        "samples": sum(step["step_samples"] for step in steps),
        **counts,
        "tokens_per_second": sum(step["tokens"] for step in steady) / seconds,
        "data_wait_share": sum(step["data_wait_seconds"] for step in steady) / seconds,
        "seconds": seconds,
    }


def _line(name: str, runs: list[dict[str, float]], first: list[dict[str, float]]) -> str:
    rates = [run["tokens_per_second"] for run in runs]
    ratios = sorted(rate / run["tokens_per_second"] for rate, run in zip(rates, first, strict=True))
    padding = runs[0]["padded_tokens"] / (runs[0]["tokens"] + runs[0]["padded_tokens"])
    waits = statistics.median(run["data_wait_share"] for run in runs)
    return (
        f"{name:21} {statistics.median(rates):8,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f})   "
        f"{statistics.median(ratios):5.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})   padding {padding:5.1%}   "
        f"data wait {waits:.1%}"
    )
