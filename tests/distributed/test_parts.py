"""Micro-batches without images, frozen eyes, and first weights: none of them may depend on the layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_vlm.families import registry
from megatron_vlm.parallel import build
from megatron_vlm.parallel.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.initialize import initialize_weights
from megatron_vlm.parallel.stages import assign_layers
from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import (
    GEMMA3,
    MISTRAL3,
    QWEN3_VL_MOE,
    TOLERANCE,
    ZERO_GRADIENT,
    Gemma3,
    Subject,
    label_tokens,
    relative_error,
)
from tests.parity import gemma3_tiny
from tests.parity.layouts import LAYOUTS, TestLayout, gather_parameter, own_micro_batches, set_up, whole_gradients
from tests.ranks import run_ranks

# Data rank 0 takes the even ones: it never sees an image.
TEXT_ON_ONE_RANK: dict[Subject, tuple[str, ...]] = {
    GEMMA3: ("text", "several images", "text", "one image"),
    QWEN3_VL_MOE: ("text", "two images", "text", "mixed"),
    MISTRAL3: ("text", "images", "text", "mixed"),
}


def gradients(hf_dir: str, layout: TestLayout, subject: Subject) -> dict[str, torch.Tensor]:
    # Far below megatron-core's 40 million elements, so that a chunk has several buckets, as real models do.
    small = partial(build.DistributedDataParallelConfig, bucket_size=4000)
    with mock.patch.object(build, "DistributedDataParallelConfig", small):
        model, groups = set_up(hf_dir, layout)
    for buffers in (model[0].buffers, model[0].expert_parallel_buffers):
        assert all(len(buffer.buckets) > 1 for buffer in buffers)
    batches = subject.micro_batches(TEXT_ON_ONE_RANK[subject])
    # megatron-core overlaps from the second step on, in the order of the first, in which the other rank has the images.
    for rank_with_images, of_step in ((0, batches[::-1]), (1, batches)):
        for chunk in model:
            chunk.zero_grad_buffer()
        mine = own_micro_batches(of_step, groups, layout)
        assert all((batch.feature_index >= 0).any() == (groups.dp.rank() == rank_with_images) for batch in mine)
        run_global_batch(model, mine, groups)
    return whole_gradients(model, groups)


@pytest.mark.parametrize(
    ("subject", "layout"),
    [
        (GEMMA3, TestLayout(2, distributed_optimizer=True, overlap=True)),
        (GEMMA3, TestLayout(4, tensor=2, distributed_optimizer=True, overlap=True, vision="data")),
        (GEMMA3, TestLayout(4, pipeline=2, distributed_optimizer=True, overlap=True)),
        (QWEN3_VL_MOE, TestLayout(2, expert=2, distributed_optimizer=True, overlap=True)),
        (
            QWEN3_VL_MOE,
            TestLayout(
                4, tensor=2, expert=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, vision="data"
            ),
        ),
        (MISTRAL3, TestLayout(2, distributed_optimizer=True, overlap=True)),
        (MISTRAL3, TestLayout(4, tensor=2, distributed_optimizer=True, overlap=True, vision="data")),
    ],
    ids=[
        "DP2",
        "DP2xTP2, vision DP",
        "DP2xPP2",
        "experts EP2",
        "experts EP2xTP2+SP, vision DP",
        "Mistral3 DP2",
        "Mistral3 DP2xTP2, vision DP",
    ],
)
def test_a_data_rank_without_images(tmp_path: Path, subject: Subject, layout: TestLayout) -> None:
    """Overlapped exchanges begin as gradients are ready: every rank must have them in the same order."""
    cases = TEXT_ON_ONE_RANK[subject]
    reference, count = subject.loss_sum_gradients(cases), label_tokens(subject, cases)
    seen = set()
    for found in run_ranks(layout.world_size, gradients, subject.write(tmp_path), layout, subject):
        for name, gradient in found.items():
            seen.add(name)
            if not name.endswith(ZERO_GRADIENT):
                assert relative_error(gradient * count, reference[name]) <= TOLERANCE, name
    assert seen == set(reference)


# Frozen eyes


def tensors_kept_by_eyes(frozen: tuple[str, ...]) -> tuple[dict[str, int], set[str]]:
    """Bytes kept for the backward pass inside the tower and the projector, and names with gradients."""
    groups = build_groups()
    initialize_megatron(1, groups)
    hf_config = GEMMA3.config
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    chunks = build_chunks(family, model_config, BuildSettings([range(4)]), groups)
    initialize_weights(chunks, 1, 0.1, gemma3_tiny.VOCABULARY, groups)
    for name, parameter in chunks[0].named_parameters():
        parameter.requires_grad_(name.partition(".")[0] not in frozen)
    kept = {"vision_tower": 0, "projector": 0}
    for part in kept:
        _count_kept(chunks[0].get_submodule(part), part, kept)
    model = wrap_data_parallel(chunks, groups, use_distributed_optimizer=False)
    model[0].zero_grad_buffer()
    run_global_batch(model, GEMMA3.micro_batches(["mixed"]), groups)
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

    def forward(x: torch.Tensor) -> torch.Tensor:
        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[part] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return compute(x)

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
    ((kept, with_gradient),) = run_ranks(1, tensors_kept_by_eyes, frozen)
    for part, size in kept.items():
        assert (size == 0) == (part in nothing_kept_in), f"{size} bytes kept in {part}"
    parts = {"language_model", "vision_tower", "projector"}
    assert {name.partition(".")[0] for name in with_gradient} == parts - set(frozen)


# First weights

UNTIED = Gemma3(tied=False)
STD = 0.02


def first_weights(subject: Subject, layout: TestLayout) -> dict[str, torch.Tensor]:
    groups = build_groups(layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor)
    hf_config = subject.config
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    layers = assign_layers(4, layout.pipeline, layout.virtual)
    settings = BuildSettings(layers, sequence_parallel=layout.sequence_parallel, vision_parallelism=layout.vision)
    chunks = build_chunks(family, model_config, settings, groups)
    initialize_weights(chunks, 11, STD, subject.vocabulary, groups)
    return {
        name: gather_parameter(parameter, parameter, groups)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


@pytest.mark.parametrize(
    ("subject", "layout"),
    [
        *((UNTIED, LAYOUTS[name]) for name in ("TP2", "TP4", "PP2xVPP2", "TP2xPP2+SP", "TP2, vision DP")),
        (QWEN3_VL_MOE, TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)),
        (MISTRAL3, LAYOUTS["TP2xPP2+SP"]),
    ],
    ids=str,
)
def test_first_weights_do_not_depend_on_the_layout(subject: Subject, layout: TestLayout) -> None:
    (alone,) = run_ranks(1, first_weights, subject, LAYOUTS["TP1"])
    ranks = run_ranks(layout.world_size, first_weights, subject, layout)
    assert set().union(*ranks) == set(alone)
    for found in ranks:
        for name, value in found.items():
            assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize("subject", [UNTIED, QWEN3_VL_MOE, MISTRAL3], ids=str)
def test_first_weights_are_what_they_should_be(subject: Subject) -> None:
    (weights,) = run_ranks(1, first_weights, subject, LAYOUTS["TP1"])
    matrices = {name: weight for name, weight in weights.items() if weight.dim() >= 2 and not name.endswith(".bias")}
    for name, weight in matrices.items():
        real = weight
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            real, padding = weight[: subject.vocabulary], weight[subject.vocabulary :]
            assert not padding.any()
        # Five deviations of the mean and of the deviation of that many draws.
        assert abs(real.mean()) < 5 * STD / real.numel() ** 0.5, name
        assert abs(real.std() - STD) < 5 * STD / (2 * real.numel()) ** 0.5, name
    # Experts are drawn one by one.
    firsts = [
        value
        for name, weight in matrices.items()
        for value in (weight.flatten(1)[:, 0].tolist() if ".experts." in name else [weight.flatten()[0].item()])
    ]
    assert len(set(firsts)) == len(firsts), "two parameters have the same numbers"
    for name in set(weights) - set(matrices):
        starts_at_one = name.endswith("weight") and (
            "layer_norm" in name or "post_layernorm" in name
            if subject == UNTIED
            else "norm" in name or "ln_pre" in name
        )
        expected = 1.0 if starts_at_one and (name.startswith("vision_tower") or subject != UNTIED) else 0.0
        assert (weights[name] == expected).all(), name
