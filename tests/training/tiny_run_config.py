"""Tiny randomised model directories with processor and JSONL data, configurations for them, and runs on pool ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.loop import Trainer
from megatron_vlm.training.setup import set_up
from megatron_vlm.training.signals import StopRequests
from tests.checkpoint.tiny_run import prepare_process
from tests.data.rows import write_jsonl
from tests.data.sounds import write_tones
from tests.data.tiny_processor import build_tokenizer
from tests.families.gemma3 import GEMMA3
from tests.families.rows import GLOBAL_BATCH, IMAGE_SIZES, SOUND_LENGTHS, TEXT_ROWS
from tests.families.tiny_family import TinyFamily


@dataclass(frozen=True)
class TinyFiles:
    """A model directory and the rows it is trained on."""

    family: TinyFamily
    model: Path
    data: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in file order."""
        return [json.loads(line) for line in self.data.read_text().splitlines()]


def build_multimodal(folder: Path, family: TinyFamily, dtype: torch.dtype = torch.float32) -> TinyFiles:
    """A vision-language model, its processor, and rows with and without images."""
    processor = family.build_processor(folder / "model")
    family.build(tokenizer=processor.tokenizer).to(dtype).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(3)
    for number, size in enumerate(IMAGE_SIZES):
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    write_tones(folder, {str(number): seconds for number, seconds in enumerate(SOUND_LENGTHS)})
    write_jsonl(folder / "mixed.jsonl", list(family.rows))
    write_jsonl(folder / "text.jsonl", list(TEXT_ROWS))
    return TinyFiles(family, folder / "model", folder / "mixed.jsonl")


def build_text(folder: Path) -> TinyFiles:
    """A model directory without a vision tower (Gemma 3's), its tokenizer, and rows of text."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    GEMMA3.build(with_vision=False, tokenizer=tokenizer).save_pretrained(folder / "model")
    write_jsonl(folder / "text.jsonl", list(TEXT_ROWS))
    return TinyFiles(GEMMA3, folder / "model", folder / "text.jsonl")


def tiny_config(files: TinyFiles, run_dir: Path, settings: Mapping[str, Any]) -> Config:
    """A configuration in fp32, rows in file order, with the family's settings and these ("section.key" -> value)."""
    defaults = {
        "run_dir": str(run_dir),
        "model.hf_path": str(files.model),
        "data.train": [{"path": str(files.data)}],
        "data.seq_length": 512,
        "data.num_workers": 0,
        "data.shuffle": False,
        "data.strict": True,
        "train.train_iters": 1,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.precision": "fp32",
    }
    return load_config(
        [f"--{key}={_argument(value)}" for key, value in (defaults | files.family.settings | dict(settings)).items()]
    )


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def names_of(batch: MicroBatch) -> list[str]:
    """The rows of the data in a micro-batch."""
    return batch.document_names


def train_on_rank(config: Config, describe: Callable[[MicroBatch], list[Any]] = names_of) -> list[list[Any]]:
    """On a pool rank: one start of a run; returns what describes the micro-batches of this rank in each step."""
    prepare_process()
    requests, names = StopRequests(), []
    with RunOwner(config.run_dir) as owner:
        run = set_up(config, owner, requests)
        loader = run.train_loader
        read = loader.global_batch

        def global_batch() -> Any:
            batches = read()
            names.append([name for batch in batches for name in describe(batch)])
            return batches

        loader.global_batch = global_batch  # type: ignore[method-assign]
        try:
            Trainer(run, requests).run()
        finally:
            loader.close()
    return names


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
