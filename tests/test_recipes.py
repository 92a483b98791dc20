"""The published sizes of every family, and the recipes that train them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.families import registry
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.hardware import GPUS
from megatron_vlm.planning.memory import RankMemory, estimate_memory
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.stages import trace_stages
from tests import published_gemma3, published_gemma4, published_mistral3, published_qwen3_vl
from tests.sizes import two_sizes

CONFIGS = Path(__file__).parent.parent / "configs"
H200 = CONFIGS / "h200"
GPU_BYTES = GPUS["H100"].memory_gib * 2**30  # of 80 GB, as its driver says
SIZES: dict[str, PretrainedConfig] = {
    **{f"gemma3_{name}": published_gemma3.published_config(name) for name in published_gemma3.TEXT_SIZES},
    **{f"gemma4_{name}": published_gemma4.published_config(name) for name in published_gemma4.SIZES},
    **{f"qwen3_vl_{name}": published_qwen3_vl.published_config(name) for name in published_qwen3_vl.SIZES},
    **{name: published_mistral3.published_config(name) for name in published_mistral3.SIZES},
}
ONE_OF_EACH = "gemma3_12b", "gemma4_e4b", "gemma4_12b", "qwen3_vl_8b", "qwen3_vl_30b_a3b", "ministral3_8b"


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


def images_of_a_full_row(family: registry.Family) -> float:
    """As recipes limit them: to 280 tokens each, or 1,024."""
    return 15.0 if family.name == "gemma4" else 4.0


@cache
def memory(name: str) -> list[RankMemory]:
    """With rows full of images, and a clip of audio in each where the model takes audio."""
    family, model_config, _ = record(name)
    config, layout, _ = recipe(name)
    return estimate_memory(config, family, model_config, layout, images_of_a_full_row(family), clips_per_row=1.0)


def without_memory(hf_config: PretrainedConfig) -> PreTrainedModel:
    """transformers' model of a configuration, with shapes alone."""
    is_text = not hasattr(hf_config, "vision_config")
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(hf_config)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_equal_transformers(name: str) -> None:
    """Shapes of the weight map, without padding, add up to those of transformers' own model.

    Its saved buffers (clip bounds, scales of layers) are parameters here.
    """
    reference = without_memory(SIZES[name])
    saved = reference.state_dict(keep_vars=True).values()
    family, model_config, shapes = record(name)
    counted = sum(math.prod(weight.shape) for _, weight in family.weight_map(model_config).items())
    # A tied head is the embedding under a second name.
    assert counted == sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in saved}.values())
    assert {*model_config.parts} == {name.partition(".")[0] for name in shapes}


@dataclass(frozen=True)
class Files:
    """What a weight map asks of a directory of weights, without any."""

    tensors: Mapping[str, torch.Tensor]
    directory: str = "transformers"


@pytest.mark.parametrize("text_only", [False, True], ids=["whole", "text only"])
@pytest.mark.parametrize("name", published_gemma4.SIZES)
def test_weights_of_gemma4_are_those_of_transformers(name: str, text_only: bool) -> None:
    """Names and shapes, both ways: `match` refuses whatever is missing, surplus or of another shape."""
    hf_config = published_gemma4.published_config(name)
    family = registry.detect(hf_config)
    whole = without_memory(hf_config).state_dict()
    weight_map = family.weight_map(family.config_from_hf(hf_config, text_only))
    found = weight_map.match(Files(whole))  # type: ignore[arg-type]
    assert not found.passthrough
    if text_only:
        alone = without_memory(hf_config.text_config).state_dict()
        assert family.config_from_hf(hf_config.text_config, False) == family.config_from_hf(hf_config, True)
        found = weight_map.match(Files(alone))  # type: ignore[arg-type]
        assert found.with_copies.keys() == alone.keys()
    else:
        assert found.with_copies.keys() == whole.keys()


@pytest.mark.parametrize("name", published_gemma4.SIZES)
def test_sizes_of_gemma4_are_those_published(name: str) -> None:
    counted = sum(math.prod(shape) for shape in record(f"gemma4_{name}")[2].values())
    assert counted / 1e9 == pytest.approx(published_gemma4.SIZES[name].parameters, rel=0.002)


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
    for rank in memory(name):
        assert rank.total_bytes < 0.9 * GPU_BYTES


@pytest.mark.parametrize("name", two_sizes(sorted(path.stem for path in H200.glob("*.yaml")), "qwen3_vl_30b_a3b"))
def test_recipes_fit_h200(name: str) -> None:
    family, model_config, _ = record(name)
    config, layout, _ = recipe(name, "--config", str(H200 / f"{name}.yaml"))
    for rank in estimate_memory(config, family, model_config, layout, images_of_a_full_row(family), clips_per_row=1.0):
        assert rank.total_bytes < 0.9 * GPUS["H200"].memory_gib * 2**30


@pytest.mark.parametrize("name", two_sizes([name for name in SIZES if not name.startswith("gemma3")], *ONE_OF_EACH[1:]))
def test_recipes_say_what_they_take(name: str) -> None:
    ranks = memory(name)
    fixed = max(rank.parameter_bytes + rank.gradient_bytes + rank.optimizer_bytes for rank in ranks)
    total = max(rank.total_bytes for rank in ranks)
    media = "rows full of images" + (" and a clip of audio" if record(name)[1].audio else "")
    said = f"take at most {fixed / 2**30:.1f} GiB per rank; all, with {media}, {total / 2**30:.1f} GiB."
    assert said in recipe(name)[2].replace("\n# ", " ")


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
