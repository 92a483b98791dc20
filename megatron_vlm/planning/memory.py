"""Memory and communication of a run on each pipeline rank, counted without a GPU.

Parameters, gradients and optimizer state are exact, with megatron-core's padding, experts sharded over their own ranks,
and the optimizer state of the data rank that has most. Activations are counted by running every stage on tensors
without memory (`trace`), with rows of `data.seq_length` tokens that all have labels, and experts that all get equally
many. Not counted: the runtime itself (about 1 GiB per GPU), communication buffers, and what the allocator loses to
fragmentation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.families.registry import Family
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.recorder import Counts
from megatron_vlm.planning.stages import StageCounts, trace_stages
from megatron_vlm.planning.state_bytes import optimizer_bytes, value_bytes
from megatron_vlm.planning.trace import ChunkCounts

_SHOWN_GIB = 0.005


@dataclass(frozen=True)
class RankMemory:
    """Memory and communication of one rank of a pipeline stage; all fields but the first two are in bytes.

    Attributes:
        activation_bytes: what micro-batches in flight keep, plus the most that one pass needs beyond that.
        logits_bytes: what the head and the loss keep of one micro-batch.
        sent_bytes: what the rank sends for a micro-batch, forward and backward, by group.
        sent_bytes_per_step: what it sends when the gradients of a step are complete, by group: gradients that are
            summed over ranks, and parameters where the optimizer is distributed.
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
    sent_bytes_per_step: Mapping[str, int]
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
    stages = trace_stages(config, family, model_config, layout, images_per_row, clips_per_row)
    return [rank_memory(config, layout, rank, stage) for rank, stage in enumerate(stages)]


def rank_memory(config: Config, layout: Layout, pipeline_rank: int, stage: StageCounts) -> RankMemory:
    """Return the memory of a pipeline rank from what its stage counted."""
    step = stage.step
    return RankMemory(
        pipeline_rank=pipeline_rank,
        num_parameters=sum(entry.num_values for entry in stage.parameters.values()),
        parameter_bytes=step.parameter_bytes,
        gradient_bytes=step.gradient_bytes,
        optimizer_bytes=max(
            optimizer_bytes(config, dense, matrices)
            for dense, matrices in zip(step.dense_shards, step.matrix_shards, strict=True)
        )
        + optimizer_bytes(config, max(step.expert_shards), max(step.expert_shards)),
        activation_bytes=_activation_bytes(stage.chunks, passes_alive(config, layout, pipeline_rank)),
        logits_bytes=sum(chunk.head.kept_bytes for chunk in stage.chunks if chunk.head is not None),
        sent_bytes=_sent_bytes(stage.chunks),
        sent_bytes_per_step=_by_group(step.exchanges),
        received_bytes=_received_bytes(config, layout, pipeline_rank, stage.chunks),
        received_patch_bytes=_received_patch_bytes(layout, pipeline_rank, stage.chunks),
    )


def passes_alive(config: Config, layout: Layout, pipeline_rank: int) -> int:
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


def _by_group(counts: Counts) -> dict[str, int]:
    sent: dict[str, int] = {}
    for (_, group), num_bytes in counts.sent_bytes.items():
        sent[group] = sent.get(group, 0) + num_bytes
    return sent


def _sent_bytes(chunks: list[ChunkCounts]) -> dict[str, int]:
    sent: Counter[str] = Counter()
    for chunk in chunks:
        sent.update(_by_group(chunk.total))
        # A stage sends its outputs on, and the gradients of its inputs back.
        sent["pipeline"] += chunk.returned_bytes + chunk.received_bytes
    return dict(+sent)


def _received_bytes(
    config: Config, layout: Layout, pipeline_rank: int, chunks: list[ChunkCounts]
) -> dict[int, tuple[float, float]]:
    received = {}
    for number, chunk in zip(layout.chunks_of(pipeline_rank), chunks, strict=True):
        if chunk.received is None or number <= layout.embedding_chunk:
            continue
        hidden, carried = chunk.received.hidden, chunk.received.carried.values()
        first_layer = sum(map(len, layout.chunks[:number]))
        num_tokens = hidden[0] * hidden[1] * layout.sequence_shards
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
    per_step = [entry.sent_bytes_per_step for entry in memory]
    for group in dict.fromkeys(group for sent in per_step for group in sent):
        lines.append((group, max(sent.get(group, 0) for sent in per_step), "step"))
    for group, num_bytes, unit in lines:
        if num_bytes >= _SHOWN_GIB * 2**30:
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
