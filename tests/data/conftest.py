"""Model directories and data files that the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_vlm.config import Config, DataSettings, DataSource, ModelSettings, TrainSettings
from megatron_vlm.data.measure_rows import Chunk, measure_chunk
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.families.gemma3.prompt import prompt_rules
from megatron_vlm.families.gemma4 import prompt as gemma4
from megatron_vlm.families.mistral3 import prompt as mistral3
from megatron_vlm.families.qwen3_vl import prompt as qwen3_vl
from tests.data.references import GEMMA4_VARIANTS, gemma3_rules, gemma4_config
from tests.data.rows import write_jsonl
from tests.data.tiny_processor import (
    GEMMA3_GENERATION_TEMPLATE,
    GEMMA4_GENERATION_TEMPLATE,
    MISTRAL_GENERATION_TEMPLATE,
    QWEN3_VL_GENERATION_TEMPLATE,
    build_mistral_processor,
    build_processor,
    build_qwen_processor,
)

SOFT_TOKENS = 4


def written(factory: pytest.TempPathFactory, build: Callable[..., object], **options: Any) -> Path:
    """A directory with a processor."""
    path = factory.mktemp(build.__name__)
    build(path, **options)
    return path


@pytest.fixture(scope="session")
def rules() -> PromptRules:
    return gemma3_rules(SOFT_TOKENS)


@pytest.fixture(scope="session")
def text_rules() -> PromptRules:
    return prompt_rules(SimpleNamespace(text_only=True, image_token_id=8))


@pytest.fixture(scope="session")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Gemma 3's own chat template, which has no generation tags."""
    return written(tmp_path_factory, build_processor, soft_tokens=SOFT_TOKENS)


@pytest.fixture(scope="session")
def tagged_hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose chat template has generation tags."""
    return written(tmp_path_factory, build_processor, soft_tokens=SOFT_TOKENS, chat_template=GEMMA3_GENERATION_TEMPLATE)


@pytest.fixture(scope="session")
def builder(hf_path: Path, rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(hf_path, rules)


@pytest.fixture(scope="session")
def tagged_builder(tagged_hf_path: Path, rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(tagged_hf_path, rules)


@pytest.fixture(scope="session")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL directory whose template has no generation tags, as published."""
    return written(tmp_path_factory, build_qwen_processor)


@pytest.fixture(scope="session")
def tagged_qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory, build_qwen_processor, chat_template=QWEN3_VL_GENERATION_TEMPLATE)


@pytest.fixture(scope="session")
def qwen_rules(qwen_path: Path) -> PromptRules:
    """Qwen3-VL's rules for the tiny processor."""
    tokenizer = AutoTokenizer.from_pretrained(qwen_path, local_files_only=True)
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    vision = SimpleNamespace(patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
    return qwen3_vl.prompt_rules(
        SimpleNamespace(text_only=False, vision=vision, image_token_id=image, video_token_id=video)
    )


@pytest.fixture(scope="session")
def qwen_builder(qwen_path: Path, qwen_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(qwen_path, qwen_rules)


@pytest.fixture(scope="session")
def tagged_qwen_builder(tagged_qwen_path: Path, qwen_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(tagged_qwen_path, qwen_rules)


@pytest.fixture(scope="session")
def mistral_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral3 directory whose template has no generation tags, as published."""
    return written(tmp_path_factory, build_mistral_processor)


@pytest.fixture(scope="session")
def tagged_mistral_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory, build_mistral_processor, chat_template=MISTRAL_GENERATION_TEMPLATE)


@pytest.fixture(scope="session")
def mistral_rules() -> PromptRules:
    """Mistral3's rules for the tiny processor, with the published image token."""
    vision = SimpleNamespace(patch_size=4, spatial_merge_size=2)
    return mistral3.prompt_rules(SimpleNamespace(text_only=False, vision=vision, image_token_id=10))


@pytest.fixture(scope="session")
def mistral_builder(mistral_path: Path, mistral_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(mistral_path, mistral_rules)


@pytest.fixture(scope="session")
def tagged_mistral_builder(tagged_mistral_path: Path, mistral_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(tagged_mistral_path, mistral_rules)


@pytest.fixture(scope="session", params=GEMMA4_VARIANTS)
def gemma4_variant(request: pytest.FixtureRequest) -> str:
    """A Gemma 4 with towers, or without (gemma4_unified)."""
    variant: str = request.param
    return variant


@pytest.fixture(scope="session")
def gemma4_path(tmp_path_factory: pytest.TempPathFactory, gemma4_variant: str) -> Path:
    """A Gemma 4 directory whose template has no generation tags, as published."""
    return written(tmp_path_factory, GEMMA4_VARIANTS[gemma4_variant])


@pytest.fixture(scope="session")
def tagged_gemma4_path(tmp_path_factory: pytest.TempPathFactory, gemma4_variant: str) -> Path:
    return written(tmp_path_factory, GEMMA4_VARIANTS[gemma4_variant], chat_template=GEMMA4_GENERATION_TEMPLATE)


@pytest.fixture(scope="session")
def gemma4_rules(gemma4_variant: str) -> PromptRules:
    """Gemma 4's rules for the tiny processor."""
    return gemma4.prompt_rules(gemma4_config(gemma4_variant))


@pytest.fixture(scope="session")
def gemma4_builder(gemma4_path: Path, gemma4_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(gemma4_path, gemma4_rules)


@pytest.fixture(scope="session")
def tagged_gemma4_builder(tagged_gemma4_path: Path, gemma4_rules: PromptRules) -> PromptBuilder:
    return PromptBuilder(tagged_gemma4_path, gemma4_rules)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with eight images of different sizes and colours."""
    for number in range(8):
        Image.new("RGB", (20 + number, 30), (number * 30, 200, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def make_reader(builder: PromptBuilder, folder: Path) -> Callable[..., RowReader]:
    """Makes a reader of rows written to one file, with data settings as keywords."""
    return partial(read_rows, builder, folder)


@pytest.fixture
def make_qwen_reader(qwen_builder: PromptBuilder, folder: Path) -> Callable[..., RowReader]:
    """The same with the Qwen3-VL processor."""
    return partial(read_rows, qwen_builder, folder)


@pytest.fixture
def make_gemma4_reader(gemma4_builder: PromptBuilder, folder: Path) -> Callable[..., RowReader]:
    """The same with the Gemma 4 processor."""
    return partial(read_rows, gemma4_builder, folder)


@pytest.fixture
def make_mistral_reader(mistral_builder: PromptBuilder, folder: Path) -> Callable[..., RowReader]:
    """The same with the Pixtral processor."""
    return partial(read_rows, mistral_builder, folder)


def read_rows(builder: PromptBuilder, folder: Path, rows: list[Any], **settings: Any) -> RowReader:
    source = DataSource(write_jsonl(folder / "rows.jsonl", rows))
    return RowReader([source], DataSettings(train=[source], **{"seq_length": 128, **settings}), builder)


def measure(reader: RowReader) -> dict[str, np.ndarray]:
    """Lengths of the rows of the first source."""
    return dict(measure_chunk(reader.measuring(), Chunk(0, 0, reader.sources[0].num_rows, 0)))


@pytest.fixture
def make_config(hf_path: Path, folder: Path) -> Callable[..., Config]:
    """Makes a configuration over files written to `folder`, with data settings as keywords."""

    def make(sources: list[DataSource], global_batch_size: int = 8, hf_path: Path = hf_path, **settings: Any) -> Config:
        return Config(
            run_dir=str(folder / "run"),
            model=ModelSettings(hf_path=str(hf_path)),
            data=DataSettings(train=sources, **{"seq_length": 128, "num_workers": 0, **settings}),
            train=TrainSettings(train_iters=4, global_batch_size=global_batch_size, eval_iters=10),
        )

    return make
