"""Memory that a run will need on each pipeline rank, from shapes alone.

Parameters, gradients and optimizer state are counted exactly, those of experts over the ranks that hold them.
Activations are an estimate (see `activations`). Not counted: the runtime itself (about 1 GiB per GPU), communication
buffers, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vlm.config import Config
from megatron_vlm.families.build import build_chunks, build_settings
from megatron_vlm.families.registry import Family
from megatron_vlm.layers.embedding import padded_vocab_size
from megatron_vlm.layers.vocab_parallel_loss import chunk_tokens
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.activations import FP32_BYTES, activation_bytes, structure_of, value_bytes

ADAM_MOMENT_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class RankMemory:
    """One rank of one pipeline stage; all fields but the first two are in bytes."""

    pipeline_rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all kinds."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.logits_bytes
        )


@dataclass(frozen=True)
class HeldParameter:
    """A parameter as one rank holds it."""

    shape: tuple[int, ...]
    is_expert: bool
    trains: bool

    @property
    def num_values(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def estimate_memory(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float = 1.0,
) -> list[RankMemory]:
    """Memory of every pipeline rank.

    Args:
        config: a validated configuration.
        family: of the model.
        model_config: the family's record of the model.
        layout: from `check_layout`.
        images_per_row: images in an average row.

    Returns:
        One entry per pipeline rank.
    """
    held = held_parameters(config, family, model_config, layout)
    shapes = {name: weight.shape for name, weight in family.weight_map(model_config).items()}
    structure = structure_of(shapes, model_config.text.hidden_size, config.model.freeze)
    memory = []
    for rank, parameters in enumerate(held):
        trainable = [entry for entry in parameters.values() if entry.trains]
        total = sum(entry.num_values for entry in parameters.values())
        experts = sum(entry.num_values for entry in trainable if entry.is_expert)
        dense = sum(entry.num_values for entry in trainable if not entry.is_expert)
        memory.append(
            RankMemory(
                pipeline_rank=rank,
                num_parameters=total,
                parameter_bytes=total * value_bytes(config),
                gradient_bytes=(dense + experts) * FP32_BYTES,
                optimizer_bytes=_optimizer_bytes(config, dense, layout.data_size)
                + _optimizer_bytes(config, experts, layout.expert_data_size),
                activation_bytes=activation_bytes(config, model_config, layout, rank, structure, images_per_row),
                logits_bytes=_logits_bytes(config, model_config, layout, rank),
            )
        )
    return memory


def held_parameters(
    config: Config, family: Family, model_config: Any, layout: Layout
) -> list[dict[str, HeldParameter]]:
    """Parameters by name that one rank of every pipeline stage holds; the other ranks' are of the same shapes.

    The model's own code builds each stage on torch's meta device, so nothing is allocated and nothing told twice.
    torch.distributed must not be initialised.
    """
    held: list[dict[str, HeldParameter]] = []
    settings = build_settings(config, layout)
    for stage in range(layout.pipeline_size):
        rank = stage * (layout.world_size // layout.pipeline_size)
        with simulated_rank(rank, layout) as groups:
            chunks = build_chunks(family, model_config, settings, groups, torch.device("meta"))
        Trainable(config.model.freeze).freeze(chunks)
        parameters: dict[str, HeldParameter] = {}
        for number, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                key = f"{name} {number}" if name in parameters else name  # a copy
                parameters[key] = HeldParameter(
                    tuple(parameter.shape), spec_of(parameter).is_expert, parameter.requires_grad
                )
        held.append(parameters)
    return held


def _optimizer_bytes(config: Config, trainable: int, copies: int) -> int:
    """Main weights (unless the parameters are fp32 themselves) and moments, which `copies` data ranks may divide."""
    main_bytes = 0 if config.train.precision == "fp32" else FP32_BYTES
    moment_bytes = ADAM_MOMENT_BYTES if config.optimizer.name == "adamw" else 0
    shards = copies if config.parallel.use_distributed_optimizer else 1
    return math.ceil(trainable / shards) * (main_bytes + moment_bytes)


def _logits_bytes(config: Config, model_config: Any, layout: Layout, pipeline_rank: int) -> int:
    """Logits that exist at a time, for one micro-batch, on the last pipeline rank."""
    if pipeline_rank != layout.pipeline_size - 1:
        return 0
    token_bytes = padded_vocab_size(model_config.text.vocab_size) // layout.tensor_size * value_bytes(config)
    tokens = config.train.micro_batch_size * config.data.seq_length
    return chunk_tokens(tokens, token_bytes, config.model.loss_chunk_mib * 2**20) * token_bytes


def format_memory(memory: list[RankMemory]) -> Iterator[str]:
    """A table in GiB, one line per pipeline rank."""
    yield "pipeline rank  parameters  weights  gradients  optimizer  activations  logits   total  (GiB per rank)"
    for entry in memory:
        columns = (
            (entry.parameter_bytes, 9),
            (entry.gradient_bytes, 11),
            (entry.optimizer_bytes, 11),
            (entry.activation_bytes, 13),
            (entry.logits_bytes, 8),
            (entry.total_bytes, 8),
        )
        figures = "".join(f"{count / 2**30:{width}.2f}" for count, width in columns)
        yield f"{entry.pipeline_rank:13d}{_abbreviated(entry.num_parameters):>12s}{figures}"


def _abbreviated(count: int) -> str:
    """A number of parameters with three digits or so."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)
