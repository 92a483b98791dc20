"""Every rank holds its share: each tensor is 1 / TP of the whole, but for a list of small ones that says why.

Real sizes are built on the meta device, which has shapes and no storage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from megatron_vlm.families import registry
from megatron_vlm.parallel.build import BuildSettings, build_chunks
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.stages import assign_layers
from tests.parity import gemma3_tiny
from tests.published_gemma3 import published_config
from tests.ranks import run_ranks

# Names of the tensors that every tensor rank holds whole, and why.
REPLICATED = {
    r"language_model\.layers\.\d+\.(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight": (
        "one vector; activations are whole, or a share of the sequence with all channels"
    ),
    r"language_model\.norm\.weight": "one vector",
    r"language_model\.layers\.\d+\.self_attn\.[qk]_norm\.weight": "one vector as long as a head, shared by all heads",
    r"vision_tower\.embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)": (
        "1 % of the tower; dividing it would need a gather of all patches"
    ),
    r"vision_tower\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)": "one vector",
    r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)\.bias": "one vector, added to the whole sum",
    r"vision_tower\.post_layernorm\.(weight|bias)": "one vector",
    r"projector\.mm_soft_emb_norm\.weight": "one vector",
}
# Beyond this share of a whole stage (in bytes), "small" is no longer true. Measured: 0.21 % at most (4B, TP2 x PP2).
SMALL = 0.005
REPLICATED_KEYS = {
    r"language_model\.layers\.\d+\.self_attn\.[kv]_proj\.weight": (
        "more tensor ranks than key/value heads: a shard would split a head"
    )
}
# Each rank encodes its own images with a whole tower: no exchange inside it, at the price of its memory.
REPLICATED_VISION = {r"(vision_tower|projector)\..*": "model.vision_parallelism: data"}


@dataclass(frozen=True)
class Case:
    tensor: int
    pipeline: int = 1
    virtual: int = 1
    vision: str = "tensor"
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline


def parameter_bytes(hf_config: PretrainedConfig, case: Case) -> dict[str, tuple[int, bool]]:
    """Name -> (bytes on this rank, whether it is marked as a shard), over all chunks of this rank."""
    groups = build_groups(case.tensor, case.pipeline)
    family, model_config = describe(hf_config)
    layers = assign_layers(len(model_config.text.layers), case.pipeline, case.virtual)
    settings = BuildSettings(
        layers,
        torch.bfloat16,
        sequence_parallel=case.sequence_parallel,
        vision_parallelism=case.vision,  # type: ignore[arg-type]
    )
    chunks = build_chunks(family, model_config, settings, groups, device=torch.device("meta"))
    found = {}
    for chunk in chunks:
        assert not list(chunk.buffers()), "a buffer would be memory that this test does not see"
        for name, parameter in chunk.named_parameters():
            assert parameter.device.type == "meta"
            assert name not in found, f"{name} is on this rank twice"
            found[name] = (parameter.nbytes, getattr(parameter, "tensor_model_parallel", False))
    return found


def describe(hf_config: PretrainedConfig) -> tuple[registry.Family, Any]:
    family = registry.detect(hf_config)
    return family, family.config_from_hf(hf_config, text_only=False)


def whole_bytes(hf_config: PretrainedConfig) -> dict[str, int]:
    """Bytes of every tensor of the model in bf16, from the table that Hugging Face files are read by."""
    family, model_config = describe(hf_config)
    return {
        name: 2 * torch.Size(weight.padded_shape).numel() for name, weight in family.weight_map(model_config).items()
    }


def matches(name: str, patterns: dict[str, str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check(hf_config: PretrainedConfig, case: Case, extra: dict[str, str], small: float) -> None:
    whole = whole_bytes(hf_config)
    ranks = run_ranks(case.world_size, parameter_bytes, hf_config, case)
    used = set()
    for held in ranks:
        stage_total = sum(whole[name] for name in held)
        replicated = {name for name in held if matches(name, REPLICATED | extra)}
        for name, (size, is_shard) in held.items():
            if name in replicated:
                used |= {pattern for pattern in REPLICATED | extra if re.fullmatch(pattern, name)}
                assert size == whole[name] and not is_shard, name
            else:
                assert size * case.tensor == whole[name] and is_shard, f"{name} is not on the list and is not divided"
        replicated_bytes = sum(whole[name] for name in replicated)
        assert sum(size for size, _ in held.values()) <= stage_total / case.tensor + replicated_bytes
        named = sum(whole[name] for name in held if matches(name, REPLICATED))
        assert named <= small * stage_total, f"{named / stage_total:.2%} of a stage is replicated"
    assert set().union(*ranks) == set(whole), "no rank holds some tensor"
    assert used == set(REPLICATED | extra), "a name on the list is held by nobody"


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
def test_published_sizes(size: str, case: Case) -> None:
    check(published_config(size), case, {}, SMALL)


def test_divided_images_replicate_the_tower_and_nothing_else() -> None:
    hf_config = published_config("4b")
    case = Case(4, vision="data")
    check(hf_config, case, REPLICATED_VISION, 1.0)


def test_more_tensor_ranks_than_key_heads() -> None:
    """The tiny model has two: 4 ranks hold keys and values whole. Its vectors are not small beside its matrices."""
    check(gemma3_tiny.build(with_vision=True).config, Case(4), REPLICATED_KEYS, 0.2)


@pytest.mark.parametrize("case", [Case(2), Case(2, pipeline=2), Case(2, vision="data")], ids=str)
def test_tiny(case: Case) -> None:
    extra = REPLICATED_VISION if case.vision == "data" else {}
    check(gemma3_tiny.build(with_vision=True).config, case, extra, 1.0 if extra else 0.2)
