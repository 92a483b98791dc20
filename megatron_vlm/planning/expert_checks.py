"""Checks of how experts are sharded over ranks, for models that have experts and for those that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_vlm.config import Config
from megatron_vlm.config_checks import alternatives, divisors, nearest_multiples
from megatron_vlm.errors import ConfigError, LaunchError, UserError
from megatron_vlm.model_configs import DecoderLayerConfig, MoEConfig, VisionLanguageConfig

GROUPED_PRODUCT_ALIGNMENT_BYTES = 16  # torch's grouped_mm: rows of every operand start at multiples of it


def experts_of(layer: DecoderLayerConfig) -> MoEConfig | None:
    """Return the experts of a decoder layer; None where it is dense."""
    return layer.moe


def expert_problems(config: Config, model_config: VisionLanguageConfig) -> Iterator[UserError]:
    """Check the experts, their width and their settings against the expert-parallel sizes."""
    parallel, text = config.parallel, model_config.text
    experts = list(dict.fromkeys(moe for layer in text.layers if (moe := experts_of(layer)) is not None))
    if not experts:
        yield from _dense_problems(config)
        return
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield ConfigError(
            f"parallel.tensor_model_parallel_size {parallel.tensor_model_parallel_size} with experts needs "
            "parallel.sequence_parallel, because each tensor rank routes its own tokens",
            fix="set parallel.sequence_parallel to true",
        )
    for number in dict.fromkeys(moe.num_experts for moe in experts):
        if number % parallel.expert_model_parallel_size:
            yield ConfigError(
                f"{number} experts cannot be divided over parallel.expert_model_parallel_size "
                f"{parallel.expert_model_parallel_size}",
                fix=f"use {divisors(number, number)}",
            )
    alignment = GROUPED_PRODUCT_ALIGNMENT_BYTES // (4 if config.train.precision == "fp32" else 2)
    for width in dict.fromkeys(moe.intermediate_size for moe in experts):
        yield from _width_problems(config, width, alignment)
    if text.hidden_size % alignment:
        yield ConfigError(
            f"hidden size {text.hidden_size} is no multiple of {alignment}, which torch's grouped product needs for "
            f"experts in {config.train.precision}",
            fix=_alignment_remedy(config, text.hidden_size),
        )


def _dense_problems(config: Config) -> Iterator[UserError]:
    """Find settings about experts for a model without any."""
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if getattr(config.parallel, name) != 1:
            yield ConfigError(
                f"parallel.{name} is {getattr(config.parallel, name)}, but the model has no experts", fix="set it to 1"
            )
    if config.model.moe_load_balancing != "none":
        yield ConfigError(
            f"model.moe_load_balancing is {config.model.moe_load_balancing}, but the model has no experts",
            fix="set it to none",
        )


def _width_problems(config: Config, width: int, alignment: int) -> Iterator[UserError]:
    """Check that an expert's width splits over its ranks, and that each shard suits the grouped matmul."""
    size = config.parallel.expert_tensor_parallel_size
    if width % size == 0 and width // size % alignment == 0:
        return
    fitting = [candidate for candidate in range(1, width + 1) if width % (candidate * alignment) == 0]
    what = f"expert width {width} cannot be divided over parallel.expert_tensor_parallel_size {size}"
    if width % size == 0:
        what += (
            f": {width // size} is no multiple of {alignment}, which torch's grouped product needs in "
            f"{config.train.precision}"
        )
    yield ConfigError(what, fix=f"use {alternatives(fitting)}" if fitting else _alignment_remedy(config, width))


def _alignment_remedy(config: Config, number: int) -> str:
    """Return a remedy for a number of columns that does not suit the grouped matmul in any layout."""
    if config.train.precision != "fp32" and number % 4 == 0:
        return "set train.precision to fp32, which needs a multiple of 4"
    return "use a model whose hidden size and expert width are multiples of 8 (bf16) or 4 (fp32)"


def expert_rank_problems(config: Config, world_size: int) -> Iterator[UserError]:
    """Check the ranks of a pipeline stage against the two expert sizes; the stages must divide the world size."""
    parallel = config.parallel
    pipeline, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    stage_size = world_size // pipeline
    shared = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if stage_size % shared:
        yield LaunchError(
            f"the {stage_size} ranks of a pipeline stage are not a multiple of {shared} = expert "
            f"{parallel.expert_model_parallel_size} x expert-tensor {parallel.expert_tensor_parallel_size}",
            fix=f"start {nearest_multiples(world_size, math.lcm(tensor, shared) * pipeline)} ranks, or change the "
            "parallel sizes",
        )


def fewest_ranks(config: Config) -> int:
    """Return the fewest ranks that hold a copy of the dense layers and of the experts."""
    parallel = config.parallel
    shared = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return parallel.pipeline_model_parallel_size * math.lcm(dense, shared)
