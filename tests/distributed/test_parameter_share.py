"""Every rank holds its share: each tensor is 1 / TP of the whole (experts 1 / (EP x ETP)), but for a list of small ones
that says why (`replicated` in tests/families).

Real sizes are built on the meta device, which has shapes and no storage, and one rank of each stage at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import splits
from megatron_vlm.parallel.simulate import simulated_rank
from tests import published_gemma3, published_gemma4, published_mistral3, published_qwen3_vl
from tests.families import FAMILIES, gemma3, gemma4
from tests.families.tiny_family import TinyFamily, find

# Beyond this share of a whole stage (in bytes), "small" is no longer true. Measured: 0.21 % at most (Gemma 3 4B,
# TP2 x PP2), of Qwen3-VL 0.06 % (8B, TP8), of Mistral3 0.21 % (3B, TP2 x PP2), of Gemma 4 without inputs of layers
# 0.14 % (26B-A4B, TP4), with them 1.3 % (E4B, TP2 x PP2).
SMALL = 0.005
SMALL_OF_TINY = 0.2  # vectors are not small beside such matrices: 18.5 % at most (Gemma 4 31B)
# Each rank encodes its own images with a whole tower: no exchange inside it, at the price of its memory.
REPLICATED_VISION = {r"(vision_tower|projector(?!\.audio))\..*": "model.vision_parallelism: data"}


@dataclass(frozen=True)
class Case:
    tensor: int
    pipeline: int = 1
    virtual: int = 1
    vision: str = "tensor"
    sequence_parallel: bool = False
    expert: int = 1
    expert_tensor: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage, which hold one copy at least."""
        return math.lcm(self.tensor, self.expert * self.expert_tensor)

    def __str__(self) -> str:
        sizes = {"tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual}
        sizes |= {"ep": self.expert, "etp": self.expert_tensor}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join([*words, *(["vision data"] if self.vision == "data" else [])])


def held_by_stage(hf_config: PretrainedConfig, case: Case) -> list[dict[str, tuple[int, int, bool]]]:
    """By name: bytes on one rank of each stage, how many ranks divide it by its marks, and whether it is an expert."""
    family, model_config = describe(hf_config)
    buffers = family.weight_map(model_config).buffers
    layout = Layout.over(
        case.stage_size * case.pipeline,
        num_layers=len(model_config.text.layers),
        virtual_size=case.virtual,
        tensor_size=case.tensor,
        sequence_parallel=case.sequence_parallel,
        pipeline_size=case.pipeline,
        expert_size=case.expert,
        expert_tensor_size=case.expert_tensor,
    )
    settings = BuildSettings(
        layout,
        torch.bfloat16,
        vision_parallelism=case.vision,  # type: ignore[arg-type]
    )
    stages = []
    for stage in range(case.pipeline):
        found: dict[str, tuple[int, int, bool]] = {}
        with simulated_rank(stage * case.stage_size, layout) as groups:
            for chunk in build_chunks(family, model_config, settings, groups, device=torch.device("meta")):
                assert not list(chunk.buffers()), "a buffer would be memory that this test does not see"
                for name, parameter in chunk.named_parameters():
                    assert parameter.device.type == "meta"
                    assert name not in found, f"{name} is on this rank twice"
                    assert (spec_of(parameter).kind == "buffer") == (name in buffers), name
                    divisor = math.prod(split.group.size() for split in splits(parameter, groups))
                    found[name] = (parameter.nbytes, divisor, spec_of(parameter).is_expert)
        stages.append(found)
    return stages


def replicated_keys(hf_config: PretrainedConfig, case: Case) -> dict[str, str]:
    """The projections of keys and values with fewer heads than tensor ranks."""
    layers = describe(hf_config)[1].text.layers
    short = [str(index) for index, layer in enumerate(layers) if layer.num_key_value_heads < case.tensor]
    pattern = rf"language_model\.layers\.({'|'.join(short)})\.self_attn\.[kv]_proj\.weight"
    return {pattern: "more tensor ranks than key/value heads: a shard would split a head"} if short else {}


def describe(hf_config: PretrainedConfig) -> tuple[registry.Family, Any]:
    family = registry.detect(hf_config)
    return family, family.config_from_hf(hf_config, text_only=False)


def whole_bytes(hf_config: PretrainedConfig) -> dict[str, int]:
    """Bytes of every tensor of the model in bf16, from the table that Hugging Face files are read by."""
    family, model_config = describe(hf_config)
    return {
        name: 2 * torch.Size(weight.padded_shape).numel() for name, weight in family.weight_map(model_config).items()
    }


def matches(name: str, patterns: Mapping[str, str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check(
    hf_config: PretrainedConfig, case: Case, extra: dict[str, str], small: float, family: TinyFamily | None = None
) -> None:
    """`family` has the list; by default, the entry of the configuration's model_type."""
    whole = whole_bytes(hf_config)
    listed = (family or find(hf_config.model_type)).replicated
    replicated_names = {**listed, **extra}
    stages = held_by_stage(hf_config, case)
    used = set()
    for stage, held in enumerate(stages):
        stage_total = sum(whole[name] for name in held)
        replicated = {name for name in held if matches(name, replicated_names)}
        divided_bytes = 0
        for name, (size, divisor, expert) in held.items():
            if name in replicated:
                used |= {pattern for pattern in replicated_names if re.fullmatch(pattern, name)}
                assert size == whole[name] and divisor == 1, name
            else:
                ranks = case.expert * case.expert_tensor if expert else case.tensor
                assert size * ranks == whole[name] and divisor == ranks, f"{name} is not on the list and is not divided"
                divided_bytes += size
        replicated_bytes = sum(whole[name] for name in replicated)
        assert sum(size for size, _, _ in held.values()) == divided_bytes + replicated_bytes
        named = sum(whole[name] for name in held if matches(name, listed))
        print(
            f"{case}, stage {stage}: {(divided_bytes + replicated_bytes) / 2**30:.2f} GiB per rank, replicated "
            f"{named / stage_total:.3%} of the stage by list, {(replicated_bytes - named) / stage_total:.3%} by setting"
        )
        assert named <= small * stage_total, f"{named / stage_total:.2%} of a stage is replicated"
    assert set().union(*stages) == set(whole), "no rank holds some tensor"
    assert used == set(replicated_names), "a name on the list is held by nobody"


@pytest.mark.parametrize(
    ("size", "case"),
    [
        ("4b", Case(2)),
        ("4b", Case(4, sequence_parallel=True)),
        ("4b", Case(2, pipeline=2, sequence_parallel=True)),
        ("27b", Case(4)),
        ("27b", Case(2, pipeline=2)),
        ("27b", Case(1, pipeline=4)),
        ("27b", Case(1, pipeline=2, virtual=2)),
    ],
    ids=str,
)
def test_published_sizes_of_gemma3(size: str, case: Case) -> None:
    check(published_gemma3.published_config(size), case, {}, SMALL)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        ("8b", Case(8, sequence_parallel=True)),
        ("30b_a3b", Case(4, sequence_parallel=True, expert=8)),
        ("235b_a22b", Case(8, pipeline=8, sequence_parallel=True, expert=8)),
        ("235b_a22b", Case(4, pipeline=4, sequence_parallel=True, expert=8, expert_tensor=2)),
    ],
    ids=str,
)
def test_published_sizes_of_qwen3_vl(size: str, case: Case) -> None:
    hf_config = published_qwen3_vl.published_config(size)
    check(hf_config, case, replicated_keys(hf_config, case), SMALL)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        ("ministral3_3b", Case(2, pipeline=2)),
        ("ministral3_14b", Case(8, sequence_parallel=True)),
        ("mistral3_24b", Case(4, pipeline=2, sequence_parallel=True)),
    ],
    ids=str,
)
def test_published_sizes_of_mistral3(size: str, case: Case) -> None:
    check(published_mistral3.published_config(size), case, {}, SMALL)


@pytest.mark.parametrize(
    ("size", "family", "case", "small"),
    [
        # The linear layers of the inputs that layers have of their own are whole by design: 2 % of a layer.
        ("e2b", gemma4.GEMMA4, Case(2), 0.02),
        ("e4b", gemma4.GEMMA4, Case(2, pipeline=2), 0.02),
        ("26b_a4b", gemma4.WITH_MOE, Case(4, sequence_parallel=True, expert=8), SMALL),
        ("31b", gemma4.DENSE, Case(8, sequence_parallel=True), SMALL),
        ("12b", gemma4.UNIFIED, Case(4, sequence_parallel=True), SMALL),
    ],
    ids=str,
)
def test_published_sizes_of_gemma4(size: str, family: TinyFamily, case: Case, small: float) -> None:
    hf_config = published_gemma4.published_config(size)
    check(hf_config, case, replicated_keys(hf_config, case), small, family)


@pytest.mark.parametrize(
    "hf_config",
    [
        published_gemma3.published_config("4b"),
        published_gemma4.published_config("e4b"),
        published_qwen3_vl.published_config("8b"),
        published_mistral3.published_config("ministral3_8b"),
    ],
    ids=lambda config: config.model_type,
)
def test_divided_images_replicate_the_tower_and_nothing_else(hf_config: PretrainedConfig) -> None:
    case = Case(4, vision="data")
    check(hf_config, case, REPLICATED_VISION | replicated_keys(hf_config, case), 1.0)


def test_more_tensor_ranks_than_key_heads() -> None:
    """The tiny model has two: 4 ranks hold keys and values whole. Its vectors are not small beside its matrices."""
    config, case = gemma3.GEMMA3.config, Case(4)
    check(config, case, replicated_keys(config, case), SMALL_OF_TINY)


def tiny_case(family: TinyFamily) -> Case:
    """Experts are divided over more ranks than a stage has."""
    return Case(2, pipeline=2, sequence_parallel=True, expert=4) if family.has_experts else Case(2, pipeline=2)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.tables.step], ids=str)
def test_tiny(family: TinyFamily) -> None:
    case = tiny_case(family)
    check(family.config, case, replicated_keys(family.config, case), SMALL_OF_TINY, family)


@pytest.mark.parametrize("vision", ["tensor", "data"])
def test_tiny_on_one_stage(vision: str) -> None:
    divided = vision == "data"
    extra, small = (REPLICATED_VISION, 1.0) if divided else ({}, SMALL_OF_TINY)
    check(gemma3.GEMMA3.config, Case(2, vision=vision), extra, small)
