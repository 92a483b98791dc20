"""What one rank of every pipeline stage holds and does, from the model's own code on tensors without memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_shard import shard_for_context
from megatron_vlm.families.build import build_chunks, build_settings, context_sharding
from megatron_vlm.families.registry import Family
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import Stages, spec_of
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.data_parallel import StepCounts, count_step
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.recorder import fake_tensors
from megatron_vlm.planning.trace import ChunkCounts, Tracer


@dataclass(frozen=True)
class HeldParameter:
    """A parameter as one rank holds it.

    Attributes:
        is_partial: whether its gradient is summed over the tensor ranks.
        stages: pipeline chunks that hold a copy (`ParameterSpec.stages`).
    """

    shape: tuple[int, ...]
    is_expert: bool
    trains: bool
    is_partial: bool
    stages: Stages

    @property
    def num_values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StageCounts:
    """What one rank of a pipeline stage holds and does.

    Attributes:
        parameters: the rank's parameters by name.
        chunks: what a micro-batch does on each of the rank's model chunks.
        step: what data parallelism holds, and exchanges once per step.
    """

    parameters: Mapping[str, HeldParameter]
    chunks: list[ChunkCounts]
    step: StepCounts


def trace_stages(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float,
    clips_per_row: float = 0.0,
) -> Iterator[StageCounts]:
    """Yield what the first rank of every pipeline stage holds and does; the other ranks of a stage hold the same.

    Args:
        config: a validated configuration.
        family: the model's family.
        model_config: the family's configuration of the model.
        layout: the layout that `check_layout` returned.
        images_per_row: images in an average row, for a model that takes images.
        clips_per_row: clips of audio in an average row, for a model that takes audio.

    torch.distributed must not be initialised.
    """
    tracer = Tracer()
    for stage in range(layout.pipeline_size):
        rank = stage * (layout.world_size // layout.pipeline_size)
        with simulated_rank(rank, layout) as groups, fake_tensors():
            chunks = fake_chunks(config, family, model_config, layout, groups)
            batch = full_batch(config, family, model_config, layout, images_per_row, clips_per_row)
            parameters = held_parameters(chunks)
            counts = [tracer.trace(chunk, batch) for chunk in chunks]
            step = count_step(config, chunks, groups)
        yield StageCounts(parameters, counts, step)


def fake_chunks(
    config: Config, family: Family, model_config: Any, layout: Layout, groups: ProcessGroupCollection
) -> list[ModelChunk]:
    """Return a rank's chunks as training builds them; call it inside `fake_tensors` for chunks without memory."""
    device = platform.current().device
    chunks = build_chunks(family, model_config, build_settings(config, layout), groups, device)
    Trainable(config.model.freeze).freeze(chunks)
    return chunks


def full_batch(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float,
    clips_per_row: float,
) -> MicroBatch:
    """Return a micro-batch of rows of `data.seq_length` tokens, or the first context rank's shard of it.

    See `example_batch`.
    """
    length = -(-config.data.seq_length // layout.sequence_shards) * layout.sequence_shards
    batch = example_batch(
        model_config,
        family.prompt_rules(model_config),
        config.train.micro_batch_size,
        length,
        images_per_row,
        config.data.max_pixels,
        clips_per_row,
    )
    sharding = context_sharding(layout, model_config, rank=0)
    if sharding is not None:
        batch = shard_for_context(batch, sharding)
    return batch.to(platform.current().device)


def held_parameters(chunks: Iterable[torch.nn.Module]) -> dict[str, HeldParameter]:
    """Return the parameters of a rank's chunks by name; a chunk's number follows the names of further copies."""
    parameters: dict[str, HeldParameter] = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            key = f"{name} {number}" if name in parameters else name
            spec = spec_of(parameter)
            parameters[key] = HeldParameter(
                tuple(parameter.shape), spec.is_expert, parameter.requires_grad, spec.partial, spec.stages
            )
    return parameters
