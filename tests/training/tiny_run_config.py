"""Tiny randomised Gemma 3 directories with processor and JSONL data, configurations for them, and runs on pool ranks.

The rows are what tells layouts apart: text alone, one image, two images, answers of unequal length, and two turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from megatron_vlm.config import Config, load_config
from megatron_vlm.training.loop import Trainer
from megatron_vlm.training.setup import set_up
from megatron_vlm.training.signals import StopRequests
from tests.checkpoint.tiny_run import prepare_process
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.data.tiny_processor import build_processor, build_tokenizer
from tests.parity.gemma3_tiny import TEXT, TOKENS_PER_IMAGE, VISION

GLOBAL_BATCH = 8

# Unequal answers, so that a mean of means is far from the mean over label tokens. Rows 0 and 4 are the share of one of
# four data ranks, which so has no image at all.
MIXED_ROWS = [
    row(user("Hello, how are you today?"), assistant("I am fine, thank you. How are you?")),
    row(user(image("0.png"), "What colour is the shape?"), assistant("red")),
    row(user(image("1.png"), image("2.png"), "Describe these."), assistant("A red circle, then three squares.")),
    row(user("Answer with one word."), assistant("Yes")),
    row(user("Hi"), assistant("Hello there."), user("Where is the circle?"), assistant("It is at the top left of it.")),
    row(user("Is it ", image("3.png"), " or ", image("0.png"), "?"), assistant("left")),
    row(user(image("2.png"), "How many squares are there?"), assistant("There are three squares, I am sure of it.")),
    row(user(image("1.png")), assistant("blue"), user("And now?", image("3.png")), assistant("yellow or green")),
]  # fmt: skip
TEXT_ROWS = [
    row(user(f"Say the colour {count} times."), assistant(" ".join(["red", "green", "blue"] * count)))
    for count in (1, 4, 2, 1, 3, 2, 1, 4)
]


@dataclass(frozen=True)
class TinyFiles:
    """A model directory and the rows it is trained on."""

    model: Path
    data: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in file order."""
        return [json.loads(line) for line in self.data.read_text().splitlines()]


def build_multimodal(folder: Path, dtype: torch.dtype = torch.float32) -> TinyFiles:
    """`Gemma3ForConditionalGeneration`, its processor, and rows with and without images."""
    tokenizer = build_processor(folder / "model", VISION["image_size"], TOKENS_PER_IMAGE).tokenizer
    config = Gemma3Config(
        text_config=_text_config(tokenizer),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    _randomise(Gemma3ForConditionalGeneration(config)).to(dtype).save_pretrained(folder / "model")
    pixels = torch.randint(0, 256, (4, 40, 40, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    for number, (height, width) in enumerate([(16, 16), (40, 24), (9, 31), (20, 20)]):
        Image.fromarray(pixels[number, :height, :width].numpy()).save(folder / f"{number}.png")
    write_jsonl(folder / "mixed.jsonl", MIXED_ROWS)
    write_jsonl(folder / "text.jsonl", TEXT_ROWS)
    return TinyFiles(folder / "model", folder / "mixed.jsonl")


def build_text(folder: Path) -> TinyFiles:
    """`Gemma3ForCausalLM`, its tokenizer, and rows of text."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _randomise(Gemma3ForCausalLM(_text_config(tokenizer))).save_pretrained(folder / "model")
    write_jsonl(folder / "text.jsonl", TEXT_ROWS)
    return TinyFiles(folder / "model", folder / "text.jsonl")


def _text_config(tokenizer: PreTrainedTokenizerBase) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **(TEXT | {"vocab_size": len(tokenizer)}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )


def _randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random: zero norms and a zero projector would hide errors."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    return model


def tiny_config(files: TinyFiles, run_dir: Path, settings: Mapping[str, Any]) -> Config:
    """A configuration in fp32, rows in file order, with `settings` ("section.key" -> value) over it."""
    defaults = {
        "run_dir": str(run_dir),
        "model.hf_path": str(files.model),
        "data.train": [{"path": str(files.data)}],
        "data.seq_length": 96,
        "data.num_workers": 0,
        "data.shuffle": False,
        "data.strict": True,
        "train.train_iters": 1,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.precision": "fp32",
    }
    return load_config([f"--{key}={_argument(value)}" for key, value in (defaults | dict(settings)).items()])


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train_on_rank(config: Config) -> list[list[str]]:
    """On a pool rank: one start of a run; returns the names of the rows that this rank read in each step."""
    prepare_process()
    run = set_up(config)
    loader, names = run.train_loader, []
    read = loader.global_batch

    def global_batch() -> Any:
        batches = read()
        names.append([name for batch in batches for name in batch.row_names])
        return batches

    loader.global_batch = global_batch  # type: ignore[method-assign]
    try:
        Trainer(run, StopRequests()).run()
    finally:
        loader.close()
    return names


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
