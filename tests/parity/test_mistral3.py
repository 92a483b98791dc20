"""What only Mistral3 has: growing queries, YaRN, Pixtral's rotation; and what goes unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding, get_llama_4_attn_scale
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.mistral3 import vision
from megatron_vlm.families.mistral3.config import ModelConfig, QueryScaling, config_from_hf
from megatron_vlm.families.mistral3.model import query_scale
from megatron_vlm.layers import patches, rope
from megatron_vlm.layers.patches import PatchPositions
from tests.families.mistral3 import MISTRAL3
from tests.parity.comparison import CLEARLY_WRONG, worst_logits
from tests.parity.layouts import RankResult, TestLayout, run_case
from tests.published_mistral3 import published_config
from tests.ranks import run_ranks

# The smallest error of those below, of the approximate gelu, is 5.7e-4.
Mistake = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return MISTRAL3.write(tmp_path_factory.mktemp("hf"))


# Positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_grow_as_transformers_says(dtype: torch.dtype) -> None:
    """At the published 16384 tokens, short of which the scale is one."""
    positions = torch.tensor([[0, 1, 16383], [16384, 32767, 32768], [100_000, 131_072, 262_143]])
    ours = query_scale(positions, QueryScaling(0.1, 16384), dtype)
    theirs = get_llama_4_attn_scale(positions, 0.1, 16384).to(dtype)  # [B, 1, S, 1]
    assert torch.equal(ours.t(), theirs[:, 0, :, 0])
    assert (ours[:, 0] == 1).all() and (ours[:, 1:] > 1).all()


def our_frequencies(model: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angles at position one, and the scale of cosines and sines."""
    text = model.text
    assert text.yarn is not None
    position = torch.ones((1, 1), dtype=torch.int64)
    with mock.patch.object(rope, "_table", lambda angles, _, scale: (angles.flatten(), scale)):
        found = rope.yarn_table(position, text.layers[0].head_dim, text.rope_theta, text.yarn, torch.float32)
    return found  # type: ignore[return-value]


YARN_SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "unrounded bounds": {"truncate": False},
    "scale by the factor": {"mscale": None, "mscale_all_dim": None},
    "scale by two factors": {"mscale_all_dim": 0.5},
    "scale given": {"attention_factor": 1.5},
}


@pytest.mark.parametrize("settings", YARN_SETTINGS)
@pytest.mark.parametrize("size", ["ministral3_8b", "ministral3_14b"])  # of bases 1e6 and 1e9
def test_yarn_frequencies(size: str, settings: str) -> None:
    hf_config = published_config(size)
    hf_config.text_config.rope_parameters |= YARN_SETTINGS[settings]
    ours, scale = our_frequencies(config_from_hf(hf_config, text_only=False))
    theirs = Ministral3RotaryEmbedding(hf_config.text_config)
    # Some five roundings of fp32 in another order, near the ramp's end of a difference that is small beside its terms.
    assert ((ours - theirs.inv_freq).abs() <= (1e-6 * theirs.inv_freq).clamp(max=1e-7)).all()
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert (scale == 1) == (settings in ("published", "unrounded bounds"))
    rounded, _ = our_frequencies(config_from_hf(published_config(size), text_only=False))
    differs = ((ours - rounded) / rounded).abs().max() > 0.1
    assert differs == (settings == "unrounded bounds")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_turn_with_row_and_column_as_in_transformers(dtype: torch.dtype) -> None:
    """All places of the largest published image, bit for bit."""
    hf_config = published_config("mistral3_24b")
    side = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    size = torch.full_like(row, side)
    config = config_from_hf(hf_config, text_only=False).vision
    assert config is not None
    ours = vision.patch_rope(PatchPositions(row, column, size, size), config, dtype)
    rotary = PixtralVisionRotaryEmbedding(hf_config.vision_config)
    theirs = rotary(torch.zeros(1, dtype=dtype), torch.stack((row, column), dim=-1))
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(torch.cat((mine, mine), dim=-1), its)


# Mistakes that train without an error: the suite of tests/parity must see them


@contextmanager
def blocks_patch_by_patch() -> Iterator[None]:
    def forward(merger: vision.PatchMerger, x: torch.Tensor) -> torch.Tensor:
        return merger.merging_layer(x.unflatten(0, (-1, merger.block)).flatten(1))

    with mock.patch.object(vision.PatchMerger, "forward", forward):
        yield


@contextmanager
def patches_in_raster_order() -> Iterator[None]:
    places = patches.patch_positions
    with mock.patch.object(patches, "patch_positions", lambda images, _, device: places(images, 1, device)):
        yield


@contextmanager
def rows_and_columns_swapped() -> Iterator[None]:
    table = vision.patch_rope

    def swapped(places: PatchPositions, *arguments: Any) -> vision.RopeTable:
        return table(replace(places, row=places.column, column=places.row), *arguments)

    with mock.patch.object(vision, "patch_rope", swapped):
        yield


@contextmanager
def columns_with_the_slow_half_of_the_frequencies() -> Iterator[None]:
    def halves(places: PatchPositions, config: Any, dtype: torch.dtype) -> vision.RopeTable:
        head_dim = config.hidden_size // config.num_attention_heads
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        fast, slow = frequencies.chunk(2)
        angles = torch.cat((places.row[:, None] * fast, places.column[:, None] * slow), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    with mock.patch.object(vision, "patch_rope", halves):
        yield


@contextmanager
def images_see_each_other() -> Iterator[None]:
    segments = patches.Segments
    with mock.patch.object(patches, "Segments", lambda lengths, *rest: segments((sum(lengths),), *rest)):
        yield


@contextmanager
def approximate_gelu_in_the_projector() -> Iterator[None]:
    with mock.patch.object(vision, "gelu", partial(vision.gelu, approximate="tanh")):
        yield


@contextmanager
def eps_of_the_tower_in_the_projector() -> Iterator[None]:
    build = vision.Projector.__init__

    def with_eps(projector: vision.Projector, config: Any, *arguments: Any) -> None:
        build(projector, replace(config, projector_norm_eps=config.norm_eps), *arguments)

    with mock.patch.object(vision.Projector, "__init__", with_eps):
        yield


@contextmanager
def queries_that_do_not_grow() -> Iterator[None]:
    with mock.patch("megatron_vlm.families.mistral3.model.query_scale", lambda *_: None):
        yield


@contextmanager
def unrounded_bounds_of_yarn() -> Iterator[None]:
    ramp = rope.YarnScaling.ramp
    with mock.patch.object(rope.YarnScaling, "ramp", lambda yarn, *sizes: ramp(replace(yarn, truncate=False), *sizes)):
        yield


MISTAKES: tuple[Mistake, ...] = (
    blocks_patch_by_patch,
    patches_in_raster_order,
    rows_and_columns_swapped,
    columns_with_the_slow_half_of_the_frequencies,
    images_see_each_other,
    approximate_gelu_in_the_projector,
    eps_of_the_tower_in_the_projector,
    queries_that_do_not_grow,
    unrounded_bounds_of_yarn,
)


def run_with(mistake: Mistake, hf_dir: str, batches: list[MicroBatch]) -> RankResult:
    with mistake():
        return run_case(hf_dir, TestLayout(), {"images": batches})["images"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_suite_sees_a_mistake(mistake: Mistake, hf_directory: str) -> None:
    truth = MISTRAL3.expected("images")
    (found,) = run_ranks(1, run_with, mistake, hf_directory, truth.micro_batches)
    error = worst_logits(found.logits, truth, MISTRAL3.vocabulary)
    print(f"\n{mistake.__name__}: {error:.1e}")
    assert error >= CLEARLY_WRONG
