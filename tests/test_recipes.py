"""The published sizes of every family, and the recipes that train them."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.families import registry
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.memory import RankMemory, estimate_memory, trace_stages
from megatron_vlm.planning.preflight import check_layout
from tests import published_gemma3, published_mistral3, published_qwen3_vl
from tests.sizes import two_sizes

CONFIGS = Path(__file__).parent.parent / "configs"
GPU_BYTES = 80e9
IMAGES_OF_A_FULL_ROW = 4.0  # of 1,024 tokens each
SIZES: dict[str, PretrainedConfig] = {
    **{f"gemma3_{name}": published_gemma3.published_config(name) for name in published_gemma3.TEXT_SIZES},
    **{f"qwen3_vl_{name}": published_qwen3_vl.published_config(name) for name in published_qwen3_vl.SIZES},
    **{name: published_mistral3.published_config(name) for name in published_mistral3.SIZES},
}
ONE_OF_EACH = "gemma3_12b", "qwen3_vl_8b", "qwen3_vl_30b_a3b", "ministral3_8b"


def record(name: str) -> tuple[registry.Family, Any, dict[str, tuple[int, ...]]]:
    """A published size: its family, the family's record, and the shapes of its parameters."""
    family = registry.detect(SIZES[name])
    model_config = family.config_from_hf(SIZES[name], text_only=SIZES[name].model_type == "gemma3_text")
    return family, model_config, {name: weight.padded_shape for name, weight in family.weight_map(model_config).items()}


def recipe(name: str, *overrides: str) -> tuple[Config, Layout, str]:
    """A recipe, the layout that its own command line starts, and its heading."""
    path = CONFIGS / f"{name}.yaml"
    config = load_config(["--config", str(path), *overrides])
    started = re.search(r"torchrun --nnodes (\d+) --nproc-per-node (\d+) ", path.read_text())
    assert started
    _, model_config, shapes = record(name)
    return config, check_layout(config, model_config, int(started[1]) * int(started[2]), shapes), path.read_text()


@cache
def memory(name: str, images_per_row: float) -> list[RankMemory]:
    family, model_config, _ = record(name)
    config, layout, _ = recipe(name)
    return estimate_memory(config, family, model_config, layout, images_per_row)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_equal_transformers(name: str) -> None:
    """Shapes of the weight map, without padding, add up to transformers' own model, built without memory."""
    auto = AutoModelForCausalLM if SIZES[name].model_type == "gemma3_text" else AutoModelForImageTextToText
    with torch.device("meta"):
        reference = auto.from_config(SIZES[name])
    family, model_config, shapes = record(name)
    counted = sum(math.prod(weight.shape) for _, weight in family.weight_map(model_config).items())
    assert counted == sum(parameter.numel() for parameter in reference.parameters())
    assert {*model_config.parts} == {name.partition(".")[0] for name in shapes}


@pytest.mark.parametrize("name", published_mistral3.SIZES)
def test_parameters_are_those_of_the_published_files(name: str) -> None:
    """Whether the head is tied decides over a tenth of the smallest, and the published configurations do not say."""
    family, model_config, _ = record(name)
    counted = sum(math.prod(weight.shape) for _, weight in family.weight_map(model_config).items())
    assert counted / 1e9 == pytest.approx(published_mistral3.SIZES[name][-1], abs=0.0006)


def test_every_published_size_has_a_recipe() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("demo_")} == set(SIZES)


@pytest.mark.parametrize("name", two_sizes(SIZES, *ONE_OF_EACH))
def test_recipes_fit_their_machine(name: str) -> None:
    """Each divides over the ranks that its own command line starts, and leaves 10 % of 80 GB free."""
    for rank in memory(name, IMAGES_OF_A_FULL_ROW):
        assert rank.total_bytes < 0.9 * GPU_BYTES


@pytest.mark.parametrize("name", two_sizes([name for name in SIZES if not name.startswith("gemma3")], *ONE_OF_EACH[1:]))
def test_recipes_say_what_they_take(name: str) -> None:
    ranks = memory(name, IMAGES_OF_A_FULL_ROW)
    fixed = max(rank.parameter_bytes + rank.gradient_bytes + rank.optimizer_bytes for rank in ranks)
    total = max(rank.total_bytes for rank in ranks)
    said = f"take at most {fixed / 2**30:.1f} GiB per rank; all, with rows full of images, {total / 2**30:.1f} GiB."
    assert said in recipe(name)[2]


@pytest.mark.full
def test_experts_per_rank_add_up() -> None:
    """235B-A22B over 256 ranks: a rank has its share of the experts, which all together are transformers'."""
    name = "qwen3_vl_235b_a22b"
    family, model_config, shapes = record(name)
    config, layout, _ = recipe(name)
    stages = trace_stages(config, family, model_config, layout, images_per_row=0)
    held = [stage.parameters.values() for stage in stages]
    experts = [sum(entry.num_values for entry in entries if entry.is_expert) for entries in held]
    whole = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    assert sum(experts) * layout.expert_size * layout.expert_tensor_size == whole > 0.96 * 235e9
    # Optimizer state: 12 bytes of every parameter once in the whole world, but for what tensor ranks hold twice.
    memory = estimate_memory(config, family, model_config, layout)
    state = sum(rank.optimizer_bytes for rank in memory) * layout.world_size / layout.pipeline_size
    assert state == pytest.approx(12 * sum(map(math.prod, shapes.values())), rel=0.005)


def test_a_layout_of_a_thousand_ranks() -> None:
    name = "qwen3_vl_235b_a22b"
    _, model_config, _ = record(name)
    layout = check_layout(recipe(name)[0], model_config, 1024)
    assert (layout.data_size, layout.expert_data_size) == (32, 16)
