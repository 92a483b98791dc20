"""Micro-batches without images, frozen towers, and first weights: none of them may depend on the layout."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from megatron_vlm.families import build, registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.model.init_weights import initialize_weights
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import TOLERANCE, label_tokens, loss_sum_gradients, micro_batches, relative_error
from tests.families import FAMILIES, gemma3
from tests.families.parameters import each_layout
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import ZERO_GRADIENT
from tests.parity.layouts import (
    LAYOUTS,
    TestLayout,
    by_our_names,
    gather_parameter,
    our_name,
    own_micro_batches,
    set_up,
    whole_gradients,
)
from tests.ranks import run_ranks


def text_on_one_rank(family: TinyFamily) -> tuple[str, ...]:
    """Data rank 0 takes the even ones: it never sees an image."""
    with_images = next(case for case in family.cases if case not in ("text", "mixed"))
    return ("text", with_images, "text", "mixed")


def gradients(hf_dir: str, layout: TestLayout, family: TinyFamily) -> dict[str, torch.Tensor]:
    # Far below megatron-core's 40 million elements, so that a chunk has several buckets, as real models do.
    small = partial(build.DistributedDataParallelConfig, bucket_size=4000)
    with mock.patch.object(build, "DistributedDataParallelConfig", small):
        model, groups = set_up(hf_dir, layout)
    for buffers in (model[0].buffers, model[0].expert_parallel_buffers):
        assert all(len(buffer.buckets) > 1 for buffer in buffers)
    batches = micro_batches(family, text_on_one_rank(family))
    # megatron-core overlaps from the second step on, in the order of the first, in which the other rank has the images.
    for rank_with_images, of_step in ((0, batches[::-1]), (1, batches)):
        for chunk in model:
            chunk.zero_grad_buffer()
        mine = own_micro_batches(model, of_step, groups, layout)
        assert all((batch.feature_index >= 0).any() == (groups.dp.rank() == rank_with_images) for batch in mine)
        run_global_batch(model, mine, groups)
    return whole_gradients(model, groups)


@pytest.mark.parametrize(("family", "name"), each_layout("no_images"))
def test_a_data_rank_without_images(tmp_path: Path, family: TinyFamily, name: str) -> None:
    """Overlapped exchanges begin as gradients are ready: every rank must have them in the same order."""
    layout, cases = family.tables.no_images[name], text_on_one_rank(family)
    reference, count = loss_sum_gradients(family, cases), label_tokens(family, cases)
    seen = set()
    for found in run_ranks(layout.world_size, gradients, family.write(tmp_path), layout, family):
        for parameter, gradient in found.items():
            seen.add(parameter)
            if not parameter.endswith(ZERO_GRADIENT):
                assert relative_error(gradient * count, reference[parameter]) <= TOLERANCE, parameter
    assert seen == set(reference)


# Frozen towers


def tensors_kept_by_towers(frozen: tuple[str, ...]) -> tuple[dict[str, int], set[str]]:
    """Bytes kept for the backward pass inside the tower and the projector, and names with gradients."""
    layout = Layout.over(1, num_layers=4)
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    hf_config = gemma3.GEMMA3.config
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    chunks = build_chunks(family, model_config, BuildSettings(layout), groups)
    initialize_weights(chunks, 1, 0.1, groups)
    Trainable(frozen).freeze(chunks)
    kept = {"vision_tower": 0, "projector": 0}
    for part in kept:
        _count_kept(chunks[0].get_submodule(part), part, kept)
    model = wrap_data_parallel(chunks, groups, use_distributed_optimizer=False)
    model[0].zero_grad_buffer()
    run_global_batch(model, micro_batches(gemma3.GEMMA3, ["mixed"]), groups)
    with_gradient = {
        name
        for name, parameter in chunks[0].named_parameters()
        if parameter.grad is not None or hasattr(parameter, "main_grad")
    }
    trainable = sum(parameter.numel() for parameter in chunks[0].parameters() if parameter.requires_grad)
    assert sum(buffer.grad_data.numel() for buffer in model[0].buffers) == trainable
    return kept, with_gradient


def _count_kept(module: torch.nn.Module, part: str, kept: dict[str, int]) -> None:
    compute = module.forward
    own = {parameter.data_ptr() for parameter in module.parameters()}

    def forward(*inputs: Any) -> Any:
        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[part] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return compute(*inputs)

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("frozen", "nothing_kept_in"),
    [
        ((), ()),
        (("vision_tower",), ("vision_tower",)),
        (("vision_tower", "projector"), ("vision_tower", "projector")),
        (("language_model",), ()),
    ],
    ids=["nothing", "tower", "tower and projector", "language model"],
)
def test_nothing_is_kept_for_frozen_eyes(frozen: tuple[str, ...], nothing_kept_in: tuple[str, ...]) -> None:
    ((kept, with_gradient),) = run_ranks(1, tensors_kept_by_towers, frozen)
    for part, size in kept.items():
        assert (size == 0) == (part in nothing_kept_in), f"{size} bytes kept in {part}"
    parts = {"language_model", "vision_tower", "projector"}
    assert {name.partition(".")[0] for name in with_gradient} == parts - set(frozen)


# First weights

STD = 0.02


def first_weights(family: TinyFamily, layout: TestLayout) -> dict[str, torch.Tensor]:
    ranks = layout.ranks(num_layers=4)
    groups = build_groups(ranks)
    hf_config = family.config
    registered = registry.detect(hf_config)
    model_config = registered.config_from_hf(hf_config, text_only=False)
    settings = BuildSettings(ranks, vision_parallelism=layout.vision)
    chunks = build_chunks(registered, model_config, settings, groups)
    initialize_weights(chunks, 11, STD, groups)
    return {
        name: gather_parameter(parameter, parameter, groups)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


@pytest.mark.parametrize(("family", "name"), each_layout("first_weights"))
def test_first_weights_do_not_depend_on_the_layout(family: TinyFamily, name: str) -> None:
    layout = family.tables.first_weights[name]
    (alone,) = run_ranks(1, first_weights, family, LAYOUTS["TP1"])
    ranks = run_ranks(layout.world_size, first_weights, family, layout)
    assert set().union(*ranks) == set(alone)
    for found in ranks:
        for parameter, value in found.items():
            assert torch.equal(value, alone[parameter]), parameter


TABLES = re.compile(
    r".*(embed_tokens|lm_head|position_embedding|pos_embed|mlp\.gate|gate\.proj|per_layer_input\.table)\.weight"
    r"|.*(position_embedding_table|pos_embedding)"
)

FILTERS = re.compile(
    r"vision_tower\..*(patch_embedding|patch_conv|patch_embed\.proj|input_proj|patch_dense)\.weight"
    r"|audio_tower\..*\.conv\.weight"
)


def stored_by(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Parameters and buffers that files hold, by our names, and which of them are buffers."""
    stored, parameters = model.state_dict().keys(), dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return by_our_names(model, parameters | buffers), set(map(our_name, buffers))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_parameter_is_declared(family: TinyFamily) -> None:
    """Vectors are what has one dimension in transformers, and do not decay; tables have rows that are looked up."""
    registered = registry.detect(family.config)
    model_config = registered.config_from_hf(family.config, text_only=False)
    theirs, buffers = stored_by(family.model())
    layout = LAYOUTS["TP1"].ranks(len(model_config.text.layers))
    with simulated_rank(0, layout) as groups:
        (chunk,) = build_chunks(registered, model_config, BuildSettings(layout), groups, torch.device("meta"))
    specs = {name: spec_of(parameter, name) for name, parameter in chunk.named_parameters()}
    assert specs.keys() == theirs.keys()
    for name, spec in specs.items():
        if name in buffers:
            assert spec.kind == "buffer" and not spec.decay, name
            continue
        is_vector = theirs[name].dim() == 1
        scales = is_vector or "depthwise" in name  # each channel by itself
        kinds = {"table": TABLES, "filter": FILTERS}
        found = [kind for kind, names in kinds.items() if names.fullmatch(name)] or ["matrix"]
        assert spec.kind == ("vector" if scales else found[0]), name
        assert spec.decay != is_vector, name
        assert spec.is_expert == (".experts." in name), name


# What transformers draws otherwise. Gemma 3's tower comes from Flax, whose matrices follow their sizes, and whose
# projection starts from zero: without a pretrained tower that would hide images from the first step on.
DRAWN_OTHERWISE = {
    "gemma3": re.compile(
        r"vision_tower\.embeddings\.(patch|position)_embedding\.weight|vision_tower\..*(proj|fc[12])\.weight"
        r"|vision_tower\..*fc[12]\.bias|projector\.mm_input_projection_weight"
    ),
}


def zero_rows(values: torch.Tensor) -> list[int]:
    return [index for index, row in enumerate(values) if not row.any()] if values.dim() > 1 else []


def check_like_transformers(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Zeros, ones, bounds that bind nothing, or normal with the same deviation but for rows of zeros."""
    for value in (0, 1, -math.inf, math.inf):
        if (theirs == value).all():
            assert (ours == value).all()
            return
    assert zero_rows(ours[: len(theirs)]) == zero_rows(theirs)
    for values in (ours, theirs):
        drawn = values[values != 0]
        assert len(drawn)
        # Five deviations of the mean and of the deviation of that many draws.
        assert abs(drawn.mean()) < 5 * STD / drawn.numel() ** 0.5
        assert abs(drawn.std() - STD) < 5 * STD / (2 * drawn.numel()) ** 0.5


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_first_weights_are_of_the_kinds_that_transformers_draws(family: TinyFamily) -> None:
    (weights,) = run_ranks(1, first_weights, family, LAYOUTS["TP1"])
    fresh = type(family.model())(family.config)
    theirs, _ = stored_by(fresh)
    assert set(weights) == set(theirs)
    otherwise = DRAWN_OTHERWISE.get(registry.detect(family.config).name)
    for name, ours in weights.items():
        if otherwise is not None and otherwise.fullmatch(name):
            with pytest.raises(AssertionError):
                check_like_transformers(ours, theirs[name])
            continue
        if ours.dim():
            assert not ours[len(theirs[name]) :].any(), f"vocabulary padding of {name}"
        try:
            check_like_transformers(ours, theirs[name])
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.tables.first_weights], ids=str)
def test_no_two_first_weights_are_the_same(family: TinyFamily) -> None:
    """Experts are drawn one by one."""
    (weights,) = run_ranks(1, first_weights, family, LAYOUTS["TP1"])
    firsts = [
        value
        for name, weight in weights.items()
        for value in (weight.flatten(1)[:, 0].tolist() if ".experts." in name else [weight.flatten()[-1].item()])
        if value not in (0, 1) and math.isfinite(value)
    ]
    assert len(set(firsts)) == len(firsts) > 20
