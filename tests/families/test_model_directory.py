"""Model directories that are not what they should be: every one is refused in one line, before anything is built."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.families import registry
from megatron_vlm.model_configs import DecoderLayerConfig, check_numbers
from tests.families import FAMILIES
from tests.published_gemma3 import published_config as published_gemma3
from tests.published_mistral3 import published_config as published_mistral3
from tests.published_qwen3_vl import published_config as published_qwen3_vl

GOOD = {
    "gemma3": published_gemma3("4b").to_dict(),
    "gemma3_text": published_gemma3("1b").to_dict(),
    "qwen3_vl_moe": published_qwen3_vl("30b_a3b").to_dict(),
    "mistral3": published_mistral3("ministral3_3b").to_dict(),
}


def understand(folder: Path, content: object) -> Any:
    """Do with a config.json what a start does with it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content, default=str))
    hf_config = registry.load_hf_config(folder)
    family = registry.detect(hf_config)
    models = [family.config_from_hf(hf_config, text_only) for text_only in (False, True)]
    return [name for model in models for name, _ in family.weight_map(model).items()]


def refusal(folder: Path, content: object) -> str:
    with pytest.raises(ConfigError) as caught:
        understand(folder, content)
    line = str(caught.value)
    assert "\n" not in line and " -- " in line and len(line) < 700
    return line


def changed(model: str, key: str, value: object) -> dict[str, Any]:
    content = copy.deepcopy(GOOD[model])
    *sections, name = key.split(".")
    section = content
    for part in sections:
        section = section[part]
    assert name in section, f"{model} has no {key}"
    section[name] = value
    return content


@pytest.mark.parametrize("model", GOOD)
def test_published_configurations_are_understood(tmp_path: Path, model: str) -> None:
    assert understand(tmp_path, GOOD[model])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tiny_configurations_are_understood(tmp_path: Path, family: Any) -> None:
    assert understand(tmp_path, family.config.to_dict())


SIZES = {
    "gemma3": (
        "text_config.hidden_size text_config.num_attention_heads text_config.num_key_value_heads text_config.head_dim "
        "text_config.num_hidden_layers text_config.vocab_size text_config.sliding_window mm_tokens_per_image "
        "text_config.query_pre_attn_scalar vision_config.patch_size vision_config.image_size vision_config.hidden_size "
        "text_config.rope_parameters.full_attention.rope_theta text_config.rope_parameters.full_attention.factor"
    ),
    "gemma3_text": "hidden_size intermediate_size rms_norm_eps initializer_range",
    "qwen3_vl_moe": (
        "text_config.moe_intermediate_size text_config.num_experts_per_tok text_config.decoder_sparse_step "
        "text_config.num_hidden_layers text_config.rms_norm_eps text_config.rope_parameters.rope_theta "
        "vision_config.depth vision_config.num_heads vision_config.spatial_merge_size vision_config.patch_size "
        "vision_config.temporal_patch_size vision_config.num_position_embeddings vision_config.out_hidden_size"
    ),
    "mistral3": (
        "spatial_merge_size text_config.num_hidden_layers text_config.vocab_size text_config.rope_parameters.factor "
        "text_config.rope_parameters.beta_fast text_config.rope_parameters.original_max_position_embeddings "
        "vision_config.num_hidden_layers vision_config.num_attention_heads vision_config.patch_size"
    ),
}
PAIRS = [(model, key) for model, keys in SIZES.items() for key in keys.split()]


@pytest.mark.parametrize(("model", "key"), PAIRS)
def test_numbers_that_no_model_can_have(tmp_path: Path, model: str, key: str) -> None:
    """Zero, negative, not finite, absurd, of another type: for every key that is a size or a factor."""
    for value in (0, -1, math.nan, math.inf, 10**30, [], {}, "x", True):
        if (key, value) == ("text_config.decoder_sparse_step", True):
            continue  # one
        assert str(tmp_path / "config.json") in (line := refusal(tmp_path, changed(model, key, value))) or (
            "[config.json]" in line
        )


@pytest.mark.parametrize(
    ("model", "key", "value", "expected"),
    [
        ("gemma3", "text_config.num_key_value_heads", 3, "num_attention_heads 8 with num_key_value_heads 3"),
        ("gemma3", "text_config.pad_token_id", 10**6, "pad_token_id 1000000 with vocab_size 262208"),
        ("gemma3", "text_config.num_hidden_layers", 10**9, "text_config.num_hidden_layers is 1000000000"),
        ("gemma3", "vision_config.patch_size", 1000, "mm_tokens_per_image 256 with 0 x 0 patches"),
        ("gemma3", "text_config.rms_norm_eps", 2.5, "layers.norm_eps 2.5"),
        ("mistral3", "text_config.rope_parameters.rope_theta", 1e-300, "rope_theta 1e-300"),
        ("mistral3", "vision_config.num_attention_heads", 7, "vision head_dim"),
        ("qwen3_vl_moe", "text_config.num_experts_per_tok", 129, "num_experts_per_tok 129 of 128 experts"),
        ("qwen3_vl_moe", "vision_config.deepstack_visual_indexes", [-1], "deepstack_visual_indexes [-1]"),
    ],
)
def test_the_culprit_is_named(tmp_path: Path, model: str, key: str, value: object, expected: str) -> None:
    assert expected in refusal(tmp_path, changed(model, key, value))


def test_odd_head_sizes_are_refused_whatever_transformers_does() -> None:
    layer = DecoderLayerConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=7,
        intermediate_size=8,
        window=None,
        softmax_scale=1.0,
        norm_eps=1e-6,
    )
    with pytest.raises(ConfigError, match="head_dim 7, an odd number, is not supported for a family"):
        check_numbers(layer, "a family")
    check_numbers(replace(layer, head_dim=8), "a family")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "config.json is not an object with keys"),
        ("null", "config.json is not an object with keys"),
        ('"gemma3"', "config.json is not an object with keys"),
        ("", "config.json cannot be read: Expecting value"),
        ("[" * 100_000, "config.json cannot be read: maximum recursion depth"),
        ("{}", "model_type None is not supported"),
        ('{"model_type": ["gemma3"]}', "model_type ['gemma3'] is not supported"),
        ('{"model_type": "gemma3", "text_config": []}', "refuses config.json"),
        ('{"model_type": "gemma3", "x": 1e400}', "x is inf"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, expected: str) -> None:
    line = refusal(tmp_path, content)
    assert expected in line and f"{tmp_path}/config.json" in line


def _with(**files: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return make


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_with(), "give a directory in Hugging Face format"),
        (_with(adapter_config__json="{}"), "this is an adapter: merge it into its base model"),
        (_with(params__json="{}", consolidated__safetensors=""), "files in Mistral's own format"),
        (lambda folder: folder.write_text(""), "this is a file: give the directory that it is in"),
        (lambda folder: None, "there is no such directory"),
    ],
)
def test_directories_without_a_configuration(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(ConfigError, match=r"no config\.json") as caught:
        registry.load_hf_config(folder)
    assert expected in str(caught.value) and f"[{folder}]" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, name: str, device: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD["gemma3_text"], default=str))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if device is None else os.symlink(device, tmp_path / name)
    with pytest.raises(ConfigError, match="pipe or device") as caught:
        registry.load_hf_config(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("consolidated.safetensors", "in Mistral's own format"),
        ("consolidated-00001-of-00002.safetensors", "in Mistral's own format"),
        ("adapter_model.safetensors", "those of an adapter only"),
        ("model.gguf", "in the format of llama.cpp"),
        ("model.pth", "pickles"),
    ],
)
def test_weights_in_other_formats(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(tmp_path)
    assert expected in str(caught.value) and name in str(caught.value) and caught.value.fix
