"""What files of a model directory may not do to rows: cut them, pad them, give ids without rows in the embedding."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data.loader import BatchSharding, build_train_loader
from megatron_vlm.data.prompts import PromptBuilder
from tests.data.references import draw_pictures, encode
from tests.data.rows import assistant, image, numbered_rows, user, write_jsonl

BUILDERS = {"gemma3": "builder", "qwen3_vl": "qwen_builder", "mistral3": "mistral_builder"}
LONG = [
    {"role": "user", "content": "Tell me something long"},
    {
        "role": "assistant",
        "content": "one two three four five six seven eight nine ten eleven twelve thirteen",
    },
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "final answer"},
]
PICTURE = [user(image("photo.jpg"), "x"), assistant("a long answer with many words in it to be cut, more than forty")]
# (tokens, trained tokens) of LONG.
FIGURES = {"gemma3": (102, 61), "qwen3_vl": (99, 60), "mistral3": (86, 61)}


@pytest.fixture(params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family_builder(family: str, request: pytest.FixtureRequest) -> PromptBuilder:
    return request.getfixturevalue(
        {"gemma3": "builder", "qwen3_vl": "qwen_builder", "mistral3": "mistral_builder"}[family]
    )


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


TRUNCATION = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 200},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
# Settings in tokenizer.json, in tokenizer_config.json, and what the start says of them.
STORED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a truncating call": ({"truncation": TRUNCATION}, {}, ["max_length 40", "truncation to 40 tokens"]),
    "a padding call": ({"padding": PADDING}, {}, ["max_length 200", "pad_to_multiple_of 8", "padding 200"]),
    "both": ({"padding": PADDING, "truncation": TRUNCATION}, {}, ["truncation to 40 tokens", "padding 200"]),
    "arguments": (
        {},
        {"max_length": 40, "truncation": True, "padding": "max_length", "padding_side": "left", "stride": 2},
        ["max_length 40", "padding max_length", "stride 2", "truncation True"],
    ),
    "a limit without a side": ({}, {"max_length": 30, "model_max_length": 20}, ["max_length 30"]),
    "words": ({}, {"is_split_into_words": True, "return_overflowing_tokens": True}, ["is_split_into_words True"]),
    "no control tokens": ({}, {"split_special_tokens": True}, ["split_special_tokens True"]),
    "sizes of images": ({}, {"size": {"height": 8, "width": 8}, "do_resize": False}, ["size {"]),
    "nothing that matters": ({}, {"padding_side": "left", "truncation_side": "left", "model_max_length": 9}, []),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_settings_change_nothing(
    family_builder: PromptBuilder, family: str, folder: Path, tmp_path: Path, name: str
) -> None:
    """Ids, trained tokens and pixels are those of the same directory without the settings, which are named."""
    draw_pictures(folder, {})
    of_tokenizer, of_config, named = STORED[name]
    path = tmp_path / "model"
    shutil.copytree(family_builder.hf_path, path)
    change(path / "tokenizer.json", **of_tokenizer)
    change(path / "tokenizer_config.json", **of_config)
    builder = PromptBuilder(path, family_builder.rules)
    assert len(builder.notes) == bool(named)
    assert all(setting in builder.notes[0] for setting in named)
    for messages in (LONG, PICTURE):
        sample, clean = encode(builder, messages, folder), encode(family_builder, messages, folder)
        assert sample.input_ids.tolist() == clean.input_ids.tolist()
        assert sample.trained.tolist() == clean.trained.tolist()
        assert sample.media == clean.media
        assert all(torch.equal(sample.media_inputs[key], clean.media_inputs[key]) for key in clean.media_inputs)
    sample = encode(builder, LONG, folder)
    assert (len(sample.input_ids), int(sample.trained.sum())) == FIGURES[family]


def test_start_names_ignored_settings_once(
    make_config: Callable[..., Config],
    hf_path: Path,
    builder: PromptBuilder,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "model"
    shutil.copytree(hf_path, path)
    change(path / "tokenizer.json", truncation=TRUNCATION)
    config = make_config([DataSource(write_jsonl(folder / "a.jsonl", numbered_rows(8)))], hf_path=path)
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            build_train_loader(config, builder.rules, BatchSharding(8, 1, rank, 2), report_problems=True)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"ignored settings in the tokenizer's files of {path}"
    ]
