"""Memory and communication of a run on each pipeline rank, counted without a GPU.

Parameters, gradients and optimizer state are exact, with experts sharded over their own ranks. Activations are
counted by running every stage on tensors without memory (`trace`), with rows of `data.seq_length` tokens that all have
labels, and experts that all get equally many. Not counted: the runtime itself (about 1 GiB per GPU), communication
buffers, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.families.build import build_chunks, build_settings
from megatron_vlm.families.registry import Family
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.example_batch import example_batch
from megatron_vlm.planning.recorder import fake_tensors
from megatron_vlm.planning.state_bytes import FP32_BYTES, optimizer_bytes, value_bytes
from megatron_vlm.planning.trace import ChunkCounts, Tracer


@dataclass(frozen=True)
class RankMemory:
    """Memory and communication of one rank of a pipeline stage; all fields but the first two are in bytes.

    Attributes:
        activation_bytes: what micro-batches in flight keep, plus the most that one pass needs beyond that.
        logits_bytes: what the head and the loss keep of one micro-batch.
        sent_bytes: what the rank sends for a micro-batch, forward and backward, by group.
        sent_bytes_per_step: what it sends to data-parallel ranks for a step: gradients, and parameters where the
            optimizer is distributed.
        received_bytes: what it receives from earlier stages for a token: in all, and of hidden states alone. By the
            first decoder layer (global id) of the chunk that receives it.
        received_patch_bytes: what it receives of a micro-batch's patches, by the first layer of the vision tower on the
            chunk that receives it.
    """

    pipeline_rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    sent_bytes: Mapping[str, int]
    sent_bytes_per_step: int
    received_bytes: Mapping[int, tuple[float, float]]
    received_patch_bytes: Mapping[int, int]

    @property
    def total_bytes(self) -> int:
        """Sum of all kinds of memory."""
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
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StageCounts:
    """What one rank of a pipeline stage holds and does.

    Attributes:
        parameters: the rank's parameters by name.
        chunks: what a micro-batch does on each of the rank's model chunks.
    """

    parameters: Mapping[str, HeldParameter]
    chunks: list[ChunkCounts]


def estimate_memory(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float = 1.0,
    clips_per_row: float = 1.0,
) -> list[RankMemory]:
    """Estimate the memory of every pipeline rank.

    Args:
        config: a validated configuration.
        family: the model's family.
        model_config: the family's configuration of the model.
        layout: the layout that `check_layout` returned.
        images_per_row: images in an average row, for a model that takes images.
        clips_per_row: clips of audio in an average row, for a model that takes audio.

    Returns:
        One entry per pipeline rank.
    """
    memory = []
    stages = trace_stages(config, family, model_config, layout, images_per_row, clips_per_row)
    for rank, stage in enumerate(stages):
        parameters = stage.parameters
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
                optimizer_bytes=optimizer_bytes(config, dense, layout.data_size)
                + optimizer_bytes(config, experts, layout.expert_data_size),
                activation_bytes=_activation_bytes(stage.chunks, _passes_alive(config, layout, rank)),
                logits_bytes=sum(chunk.head.kept_bytes for chunk in stage.chunks if chunk.head is not None),
                sent_bytes=_sent_bytes(stage.chunks),
                sent_bytes_per_step=_data_parallel_bytes(config, dense, layout.data_size)
                + _data_parallel_bytes(config, experts, layout.expert_data_size),
                received_bytes=_received_bytes(config, layout, rank, stage.chunks),
                received_patch_bytes=_received_patch_bytes(layout, rank, stage.chunks),
            )
        )
    return memory


def trace_stages(
    config: Config,
    family: Family,
    model_config: Any,
    layout: Layout,
    images_per_row: float,
    clips_per_row: float = 0.0,
) -> Iterator[StageCounts]:
    """Yield the parameters of the first rank of every pipeline stage, and what a micro-batch does there.

    The other ranks of a stage hold parameters of the same shapes. torch.distributed must not be initialised.
    """
    settings, tracer, device = build_settings(config, layout), Tracer(), platform.current().device
    length = config.data.seq_length
    if layout.sequence_parallel:
        length = -(-length // layout.tensor_size) * layout.tensor_size
    for stage in range(layout.pipeline_size):
        rank = stage * (layout.world_size // layout.pipeline_size)
        with simulated_rank(rank, layout) as groups, fake_tensors():
            chunks = build_chunks(family, model_config, settings, groups, device)
            Trainable(config.model.freeze).freeze(chunks)
            parameters: dict[str, HeldParameter] = {}
            for number, chunk in enumerate(chunks):
                for name, parameter in chunk.named_parameters():
                    key = f"{name} {number}" if name in parameters else name  # a copy
                    parameters[key] = HeldParameter(
                        tuple(parameter.shape), spec_of(parameter).is_expert, parameter.requires_grad
                    )
            batch = example_batch(
                model_config,
                family.prompt_rules(model_config),
                config.train.micro_batch_size,
                length,
                images_per_row,
                config.data.max_pixels,
                clips_per_row,
            )
            batch = batch.to(device)
            counts = [tracer.trace(chunk, batch) for chunk in chunks]
        yield StageCounts(parameters, counts)


def _passes_alive(config: Config, layout: Layout, pipeline_rank: int) -> int:
    """Return the most passes of a chunk that await their backward pass (1F1B; megatron-core's warm-up rule)."""
    virtual_size = layout.virtual_size
    passes = config.train.num_micro_batches(layout.data_size) * virtual_size
    ahead = layout.pipeline_size - pipeline_rank - 1
    warm_up = ahead if virtual_size == 1 else 2 * ahead + (virtual_size - 1) * layout.pipeline_size
    return min(passes, warm_up + 1)


def _activation_bytes(chunks: list[ChunkCounts], passes_alive: int) -> int:
    """Return what passes in flight keep, equally many of each chunk, plus the most that one needs beyond that."""
    kept = [chunk.kept_bytes - (0 if chunk.head is None else chunk.head.kept_bytes) for chunk in chunks]
    return math.ceil(passes_alive * sum(kept) / len(kept)) + max(chunk.total.working_bytes for chunk in chunks)


def _sent_bytes(chunks: list[ChunkCounts]) -> Counter[str]:
    sent: Counter[str] = Counter()
    for chunk in chunks:
        for (_, group), num_bytes in chunk.total.sent_bytes.items():
            sent[group] += num_bytes
        # A stage sends its outputs on, and the gradients of its inputs back.
        sent["pipeline"] += chunk.returned_bytes + chunk.received_bytes
    return +sent


def _received_bytes(
    config: Config, layout: Layout, pipeline_rank: int, chunks: list[ChunkCounts]
) -> dict[int, tuple[float, float]]:
    received = {}
    for number, chunk in zip(layout.chunks_of(pipeline_rank), chunks, strict=True):
        if chunk.received is None or number <= layout.embedding_chunk:
            continue
        hidden, carried = chunk.received.hidden, chunk.received.carried.values()
        first_layer = sum(map(len, layout.chunks[:number]))
        num_tokens = hidden[0] * hidden[1] * (layout.tensor_size if layout.sequence_parallel else 1)
        of_hidden = value_bytes(config) * math.prod(hidden) / num_tokens
        of_others = value_bytes(config) * sum(map(math.prod, carried)) / num_tokens
        received[first_layer] = of_hidden + of_others, of_hidden
    return received


def _received_patch_bytes(layout: Layout, pipeline_rank: int, chunks: list[ChunkCounts]) -> dict[int, int]:
    numbered = zip(layout.chunks_of(pipeline_rank), chunks, strict=True)
    return {
        sum(layout.tower_counts[:number]): chunk.received_bytes
        for number, chunk in numbered
        if 0 < number <= layout.embedding_chunk
    }


def _data_parallel_bytes(config: Config, trainable: int, copies: int) -> int:
    """Return what a ring sends to reduce gradients, and to gather those gradients or the updated parameters."""
    gathered = value_bytes(config) if config.parallel.use_distributed_optimizer else FP32_BYTES
    return trainable * (FP32_BYTES + gathered) * (copies - 1) // copies


def format_memory(memory: list[RankMemory]) -> Iterator[str]:
    """Format a table in GiB, one line per pipeline rank."""
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


def format_communication(memory: list[RankMemory]) -> Iterator[str]:
    """Describe what a rank sends, one line per kind of group, for the pipeline stage that sends most."""
    sent = {
        group: max(entry.sent_bytes.get(group, 0) for entry in memory) for entry in memory for group in entry.sent_bytes
    }
    lines = [(group, num_bytes, "micro-batch") for group, num_bytes in sent.items()]
    lines.append(("data", max(entry.sent_bytes_per_step for entry in memory), "step"))
    for group, num_bytes, unit in lines:
        if num_bytes:
            yield f"{group:13s} {num_bytes / 2**30:8.2f} GiB per {unit}"


def format_boundaries(memory: list[RankMemory]) -> Iterator[str]:
    """Describe what stages send each other, where that is not only hidden states of tokens."""
    patches = {layer: sent for entry in memory for layer, sent in entry.received_patch_bytes.items()}
    if patches:
        crossing = ", ".join(f"{sent:,} before layer {layer}" for layer, sent in sorted(patches.items()))
        yield f"{'to a stage':13s} bytes of the vision tower's patches per micro-batch: {crossing}"
    received = {layer: sizes for entry in memory for layer, sizes in entry.received_bytes.items()}
    if any(total > hidden for total, hidden in received.values()):
        crossing = ", ".join(f"{total:,.0f} before layer {layer}" for layer, (total, _) in sorted(received.items()))
        (hidden,) = {hidden for _, hidden in received.values()}
        yield f"{'to a stage':13s} bytes per token: {crossing}; hidden states are {hidden:,.0f}"


def _abbreviated(count: int) -> str:
    """Format a number of parameters with about three digits."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)
