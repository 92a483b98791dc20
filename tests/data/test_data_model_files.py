"""What files of a model directory may not do to rows: cut them, pad them, give ids without rows in the embedding."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PretrainedConfig

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data.loader import BatchSharding, build_train_loader
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from megatron_vlm.families.registry import detect
from tests import published_gemma3, published_mistral3, published_qwen3_vl
from tests.data.references import draw_pictures, encode, refusal
from tests.data.rows import assistant, image, numbered_rows, user, write_jsonl
from tests.data.tiny_processor import build_processor, build_tokenizer

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


OTHER_ROW = [user("say [OBJ0]"), assistant("yes [OBJ0]")]


def with_added_tokens(path: Path, source: str, count: int, rows: int) -> list[int]:
    """Copy a directory and add [OBJ0], ... past `rows` ids; returns their ids."""
    shutil.copytree(source, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = [f"[OBJ{number}]" for number in range(rows - len(tokenizer) + count)]
    tokenizer.add_tokens(names)
    tokenizer.save_pretrained(path)
    return tokenizer.convert_tokens_to_ids(names)


@pytest.mark.parametrize("past_padding", [False, True])
def test_added_tokens_without_rows(family_builder: PromptBuilder, tmp_path: Path, past_padding: bool) -> None:
    """Whether the embedding's padding has a row for them or not."""
    rows = len(family_builder.tokenizer)
    ids = with_added_tokens(tmp_path / "model", family_builder.hf_path, 70 if past_padding else 1, rows)
    assert (max(ids) >= -(-rows // 64) * 64) == past_padding
    rules = dataclasses.replace(family_builder.rules, vocab_size=rows)
    refused = refusal(tmp_path / "model", rules)
    assert (
        f"embedding of {rows} rows has none: [OBJ0] has id {rows}" in refused and "resize_token_embeddings" in refused
    )
    assert refused.count("[OBJ") == (5 if past_padding else 1) and ("and 65 more" in refused) == past_padding
    # All have one, the last of them the last row.
    rules = dataclasses.replace(family_builder.rules, vocab_size=max(ids) + 1)
    builder = PromptBuilder(tmp_path / "model", rules)
    assert builder.notes == [] and ids[0] in encode(builder, OTHER_ROW, tmp_path).input_ids


@pytest.mark.parametrize("messages", [[user("say [OBJ0]"), assistant("b")], [user("a"), assistant("yes [OBJ0]")]])
def test_rows_with_ids_past_the_embedding(
    family_builder: PromptBuilder, tmp_path: Path, messages: list[dict[str, Any]]
) -> None:
    """Also of ordinary tokens, which the start does not look through."""
    rows = len(family_builder.tokenizer)
    with_added_tokens(tmp_path / "model", family_builder.hf_path, 1, rows)
    builder = PromptBuilder(tmp_path / "model", family_builder.rules)
    builder.rules = dataclasses.replace(family_builder.rules, vocab_size=rows)
    assert encode(builder, LONG, tmp_path).trained.any()
    with pytest.raises(DataError, match=rf"the token \[OBJ0\] with id {rows}, but .* has {rows} rows.*jsonl:7.*resize"):
        encode(builder, messages, tmp_path)


def test_placeholders_without_rows_in_text_only_models(
    tmp_path: Path, text_rules: PromptRules, rules: PromptRules
) -> None:
    """Gemma 3 270M and 1B are published with <image_soft_token> past their embedding."""
    build_tokenizer().save_pretrained(tmp_path)
    rows = move_to_the_end(tmp_path / "tokenizer.json", "<image_soft_token>")
    text_rules = dataclasses.replace(text_rules, vocab_size=rows)
    builder = PromptBuilder(tmp_path, text_rules)
    assert builder.notes == [
        "the text-only model has no rows for placeholders of media, which no row may have: "
        f"<image_soft_token> has id {rows}"
    ]
    assert encode(builder, LONG, tmp_path).trained.any()
    with pytest.raises(DataError, match="contains the control token <image_soft_token>"):
        encode(builder, [user("<image_soft_token>"), assistant("b")], tmp_path)
    # Nor may they be past the embedding of a model that takes images, nor others in a text-only one.
    build_processor(tmp_path / "images")
    move_to_the_end(tmp_path / "images" / "tokenizer.json", "<image_soft_token>")
    image_rules = dataclasses.replace(rules, vocab_size=rows, image_token_id=rows)
    assert f"<image_soft_token> has id {rows}" in refusal(tmp_path / "images", image_rules)
    assert move_to_the_end(tmp_path / "tokenizer.json", "<unk>") == rows
    assert f"none: <unk> has id {rows + 1} " in refusal(tmp_path, text_rules)


def move_to_the_end(path: Path, token: str) -> int:
    """Give an added token of a tokenizer.json the id after the last one of the vocabulary; returns its size."""
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[f"unused {token}"] = vocab.pop(token)
    added = next(item for item in content["added_tokens"] if item["content"] == token)
    added["id"] = 1 + max(len(vocab) - 1, *(item["id"] for item in content["added_tokens"] if item is not added))
    content["added_tokens"].sort(key=lambda item: item["id"])
    path.write_text(json.dumps(content))
    return len(vocab)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        published_gemma3.published_config("4b"),
        published_qwen3_vl.published_config("2b"),
        published_mistral3.published_config("ministral3_3b"),
    ],
    ids=BUILDERS,
)
def test_rules_know_the_rows_of_the_embedding(config: PretrainedConfig, text_only: bool) -> None:
    family = detect(config)
    rules = family.prompt_rules(family.config_from_hf(config, text_only=text_only))
    assert rules.vocab_size == config.get_text_config().vocab_size


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
