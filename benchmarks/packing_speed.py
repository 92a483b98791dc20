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

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS, STEPS, REPETITIONS, SEED = 320, 5, 3, 0
ROW_TOKENS = 512
TURNS_MEDIAN, TURNS_SIGMA, MOST_TURNS = 3.0, 1.0, 24


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


def train(side: Side, global_batch_size: int, folder: Path, model: Path, rows: Path) -> list[dict[str, Any]]:
    """Train for one pass over the rows as `pretrain_vlm.py` does, in this process; returns the metrics of its steps."""
    settings = {
        "config": REPOSITORY / "configs" / "demo_gemma3.yaml",
        "run_dir": folder,
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
    with (folder.parent / f"{folder.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        code = pretrain_vlm.main([f"--{key}={value}" for key, value in settings.items()])
    if code:
        raise SystemExit(f"training of {side.name!r} ended with {code}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def packed_rows(model: Path, rows: Path) -> int:
    """Return how many packed rows one pass has."""
    raise NotImplementedError
