"""What one rank of every pipeline stage holds and does, from the model's own code on tensors without memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        muon_flops: FLOPs of a Newton-Schulz iteration on its matrices, whole over tensor ranks; 0 for other kinds.
        gathered: elements of its matrices, whole, if tensor ranks have shards of them; 0 otherwise.
    """

    shape: tuple[int, ...]
    is_expert: bool
    trains: bool
    is_partial: bool
    stages: Stages
    muon_flops: int = 0
    gathered: int = 0

    @property
    def num_values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Held(NamedTuple):
    """Numbers of elements of parameters.

    Attributes:
        dense: of those that train, and are no experts'.
        experts: of experts that train.
        frozen: of all others.
        partial: of dense ones whose gradients are summed over the tensor ranks.
        copied: of those of which the stages of embedding and head have a copy.
        matrices: of dense ones that are matrices.
        gathered: of dense matrices, whole, of which each tensor rank has a shard.
        gathered_experts: of experts, likewise.
        muon_flops: FLOPs of a Newton-Schulz iteration on all dense matrices (no number of elements).
        muon_flops_experts: on all experts.
    """

    dense: int = 0
    experts: int = 0
    frozen: int = 0
    partial: int = 0
    copied: int = 0
    matrices: int = 0
    gathered: int = 0
    gathered_experts: int = 0
    muon_flops: int = 0
    muon_flops_experts: int = 0

    def plus(self, other: Held) -> Held:
        """Return the sums."""
        return Held(*map(operator.add, self, other))

    def minus(self, other: Held) -> Held:
        """Return the differences."""
        return Held(*map(operator.sub, self, other))

    def times(self, count: int) -> Held:
        """Return multiples."""
        return Held(*(count * value for value in self))

    @staticmethod
    def of(parameters: Mapping[str, HeldParameter]) -> Held:
        """Count parameters."""
        counted = dict.fromkeys(Held._fields, 0)
        for entry in parameters.values():
            kind = ("experts" if entry.is_expert else "dense") if entry.trains else "frozen"
            counted[kind] += entry.num_values
            if entry.trains:
                experts = "_experts" * entry.is_expert
                counted[f"gathered{experts}"] += entry.gathered
                counted[f"muon_flops{experts}"] += entry.muon_flops
            if kind == "dense":
                counted["partial"] += entry.num_values * entry.is_partial
                counted["copied"] += entry.num_values * (entry.stages == "embedding_and_head")
                counted["matrices"] += entry.num_values * (entry.muon_flops > 0)
        return Held(**counted)


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
            parameters = held_parameters(chunks, groups)
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


def held_parameters(chunks: Iterable[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, HeldParameter]:
    """Return the parameters of a rank's chunks by name; a chunk's number follows the names of further copies."""
    parameters: dict[str, HeldParameter] = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            key = f"{name} {number}" if name in parameters else name
            spec = spec_of(parameter)
            muon_flops, gathered = _muon_work(parameter, groups)
            parameters[key] = HeldParameter(
                tuple(parameter.shape),
                spec.is_expert,
                parameter.requires_grad,
                spec.partial,
                spec.stages,
                muon_flops,
                gathered,
            )
    return parameters


def _muon_work(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> tuple[int, int]:
    """Return `muon_flops` and `gathered` of a held parameter."""
    spec = spec_of(parameter)
    if spec.kind != "matrix":
        return 0, 0
    whole, size = list(parameter.shape), (groups.expt_tp if spec.is_expert else groups.tp).size()
    is_split = spec.tensor_dim is not None and size > 1
    if spec.tensor_dim is not None:
        whole[spec.tensor_dim] *= size
    short, long = sorted(whole[-2:])
    # X X^T, its square, and the product with X.
    flops = math.prod(whole[:-2]) * (4 * short * short * long + 2 * short**3)
    return flops, math.prod(whole) if is_split else 0
