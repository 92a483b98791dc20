"""The largest Qwen3-VL divided over 64 ranks, without a byte of its weights: who holds what, and is nothing lost."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.sharding import full_shape, splits
from megatron_vlm.parallel.simulate import simulated_rank
from tests.checkpoint import qwen3_vl_files

WORLD = 64
BF16_BYTES = 2

Sizes = tuple[int, int, int, int]
"""Tensor, pipeline, expert and expert-tensor ranks."""

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""First index and size in every dimension of a part of a tensor."""


def published_235b() -> Qwen3VLMoeConfig:
    """Qwen3-VL-235B-A22B."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20]},
        "dtype": torch.bfloat16,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def expected() -> dict[str, Shape]:
    """Shapes of transformers' own model under our names, independently of the weight map."""
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(published_235b())
    return {name: tuple(tensor.shape) for name, tensor in qwen3_vl_files.ours(dict(model.named_parameters())).items()}


def held_parts(family: registry.Family, config: object, rank: int, sizes: Sizes) -> dict[str, tuple[Shape, Box]]:
    """Shape over all ranks and own part of every parameter of one rank."""
    tensor, pipeline, expert, expert_tensor = sizes
    layout = Layout.over(
        WORLD,
        num_layers=94,
        tensor_size=tensor,
        sequence_parallel=True,
        pipeline_size=pipeline,
        expert_size=expert,
        expert_tensor_size=expert_tensor,
    )
    settings = BuildSettings(layout, torch.bfloat16)
    held = {}
    with simulated_rank(rank, layout) as groups:
        for chunk in build_chunks(family, config, settings, groups, torch.device("meta")):
            for name, parameter in chunk.named_parameters():
                start = [0] * parameter.dim()
                for split in splits(parameter, groups):
                    start[split.dim] = split.group.rank() * parameter.shape[split.dim]
                held[name] = (full_shape(parameter, groups), (tuple(start), tuple(parameter.shape)))
    return held


def check_parts_tile(name: str, shape: Shape, boxes: Counter[Box]) -> None:
    """The parts cover the whole without overlap, and as many ranks hold each."""
    sizes = {size for _, size in boxes}
    assert len(sizes) == 1 and len(set(boxes.values())) == 1, name
    size = sizes.pop()
    assert not any(whole % part for whole, part in zip(shape, size, strict=True)), name
    assert not any(first % part for start, _ in boxes for first, part in zip(start, size, strict=True)), name
    assert len(boxes) * math.prod(size) == math.prod(shape), name


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(8, 8, 8, 1), (4, 4, 8, 2)], ids=["tp8 pp8 ep8", "tp4 pp4 ep8 etp2"])
def test_every_tensor_of_the_235b_model_is_held_once(expected: dict[str, Shape], sizes: Sizes) -> None:
    """Once per replica: the ranks of one stage hold each tensor, in equal parts or as replicas of them."""
    hf_config = published_235b()
    family = registry.detect(hf_config)
    config = family.config_from_hf(hf_config, text_only=False)
    assert {name: weight.padded_shape for name, weight in family.weight_map(config).items()} == expected
    boxes: dict[str, Counter[Box]] = defaultdict(Counter)
    held_by_rank = []
    for rank in range(WORLD):
        held = held_parts(family, config, rank, sizes)
        for name, (shape, box) in held.items():
            assert shape == expected[name], name
            boxes[name][box] += 1
        held_by_rank.append(sum(math.prod(size) for _, (_, size) in held.values()))
    tensor_size, pipeline_size, expert_size, expert_tensor_size = sizes
    stage_size = WORLD // pipeline_size
    assert set(boxes) == set(expected)
    for name, counted in boxes.items():
        check_parts_tile(name, expected[name], counted)
        assert counted.total() == stage_size, name
        divided = {expert_size * expert_tensor_size} if ".experts." in name else {1, tensor_size}
        assert len(counted) in divided, name
    for stage in range(pipeline_size):
        first, *others = held_by_rank[stage * stage_size : (stage + 1) * stage_size]
        assert set(others) == {first}
        print(f"stage {stage}: {first / 1e9:.3f} billion parameters, {first * BF16_BYTES / 2**30:.2f} GiB per rank")
    total = sum(math.prod(shape) for shape in expected.values())
    print(f"model: {total / 1e9:.3f} billion parameters, held by all ranks together: {sum(held_by_rank) / 1e9:.3f}")
    assert round(total / 1e9, 2) == 235.67  # the size that its name rounds
