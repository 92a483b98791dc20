"""The plan of one layout: memory, time and communication of a step, from traces of all its stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.families.registry import Family
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.hardware import Hardware
from megatron_vlm.planning.memory import RankMemory, rank_memory
from megatron_vlm.planning.recorder import Counts
from megatron_vlm.planning.schedule import ChunkSeconds, ScheduleSeconds, schedule_seconds
from megatron_vlm.planning.stages import Held, StageCounts, trace_stages
from megatron_vlm.planning.step_time import Clock, Seconds, Span, crossing_bytes, spans_of
from megatron_vlm.planning.trace import ChunkCounts


@dataclass(frozen=True)
class Request:
    """What is planned for.

    Attributes:
        config: a validated configuration, whose layout may be replaced.
        family: the model's family.
        model_config: the family's configuration of the model.
        hardware: the GPUs and their nodes.
        num_gpus: number of GPUs.
        images_per_row: images in an average row.
        clips_per_row: clips of audio in an average row.
        headroom: part of a GPU's memory that must stay free.
    """

    config: Config
    family: Family
    model_config: Any
    hardware: Hardware
    num_gpus: int
    images_per_row: float
    clips_per_row: float
    headroom: float

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a plan may take."""
        return self.hardware.memory_gib * 2**30 * (1 - self.headroom)


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in a group per step.

    Attributes:
        sent: all of them.
        crossing: those that leave its node.
    """

    sent: int
    crossing: int


@dataclass(frozen=True)
class StepSeconds:
    """The predicted time of a step, as the busiest pipeline rank spends it.

    Attributes:
        computing: passes of the micro-batches, without exchanges.
        exchanging: exchanges of layers with other ranks.
        waiting: the pipeline's bubble: for other stages, and for what they send.
        gradients: sums of gradients and gathers of parameters that nothing overlaps.
        update: the optimizer.
    """

    computing: float
    exchanging: float
    waiting: float
    gradients: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.computing + self.exchanging + self.waiting + self.gradients + self.update


@dataclass(frozen=True)
class Plan:
    """One layout and what is predicted of it.

    Attributes:
        config: the configuration with this layout.
        memory: memory of every pipeline rank.
        step: the predicted time of a step.
        schedule: the time of its passes.
        chunks: times of a micro-batch on every chunk.
        towers: times of a micro-batch on embedding and towers, for every chunk up to the embedding's.
        traffic: what the busiest rank sends per step, by group.
        model_flops: FLOPs of matmuls of a step over all ranks, without what is recomputed.
    """

    config: Config
    layout: Layout
    memory: list[RankMemory]
    step: StepSeconds
    schedule: ScheduleSeconds
    chunks: list[Seconds]
    towers: list[Seconds]
    traffic: Mapping[str, Traffic]
    model_flops: float

    @property
    def most_bytes(self) -> int:
        """Memory of the fullest rank."""
        return max(entry.total_bytes for entry in self.memory)

    @property
    def tower_share(self) -> float:
        """Part of all chunks' time that embedding and towers take."""
        return sum(tower.total for tower in self.towers) / sum(chunk.total for chunk in self.chunks)

    @property
    def tower_share_of_rank(self) -> tuple[float, int]:
        """Most that embedding and towers take of a pipeline rank's time, and which rank that is."""
        shares = []
        for rank in range(self.layout.pipeline_size):
            towers, own = self.towers[rank :: self.layout.pipeline_size], self.chunks[rank :: self.layout.pipeline_size]
            shares.append(sum(tower.total for tower in towers) / sum(chunk.total for chunk in own))
        return max(shares), shares.index(max(shares))

    def utilisation(self, hardware: Hardware) -> float:
        """Return the part of the GPUs' peak that the model's own matmuls reach."""
        return self.model_flops / self.step.total / self.layout.world_size / (hardware.bf16_tflops * 1e12)


def make_plan(request: Request, config: Config, layout: Layout) -> Plan:
    """Trace every stage of a layout and predict its step.

    Args:
        request: what is planned for.
        config: the configuration with this layout.
        layout: the layout that `check_layout` returned.
    """
    stages = list(
        trace_stages(
            config, request.family, request.model_config, layout, request.images_per_row, request.clips_per_row
        )
    )
    clock = Clock(request.hardware, spans_of(layout, request.hardware))
    in_order = [stages[index % layout.pipeline_size].chunks for index in range(len(layout.chunks))]
    counts = [held[index // layout.pipeline_size] for index, held in enumerate(in_order)]
    chunks = [clock.seconds(chunk.total) for chunk in counts]
    num_micro_batches = config.train.num_micro_batches(layout.data_size)
    schedule = schedule_of(clock, chunks, [chunk.returned_bytes for chunk in counts], layout, num_micro_batches)
    gradients = max(exchanged_seconds(clock, stage.step.exchanges, config) for stage in stages)
    update = max(
        clock.update_seconds(max(stage.step.dense_shards) + max(stage.step.expert_shards))
        + clock.muon_seconds(config, layout, Held.of(stage.parameters))
        for stage in stages
    )
    return Plan(
        config=config,
        layout=layout,
        memory=[rank_memory(config, layout, rank, stage) for rank, stage in enumerate(stages)],
        step=step_seconds(schedule, chunks, layout, num_micro_batches, gradients, update),
        schedule=schedule,
        chunks=chunks,
        towers=[clock.seconds(_beside_layers(chunk)) for chunk in counts[: layout.embedding_chunk + 1]],
        traffic=_traffic(stages, clock.spans, layout, num_micro_batches),
        model_flops=sum(_own_flops(chunk.total) for chunk in counts)
        * num_micro_batches
        * layout.data_size
        * layout.tensor_size
        * layout.context_size,
    )


def schedule_of(
    clock: Clock, chunks: Sequence[Seconds], returned_bytes: Sequence[int], layout: Layout, num_micro_batches: int
) -> ScheduleSeconds:
    """Return the time of the passes of a step.

    Args:
        clock: where groups are, and how fast the hardware is.
        chunks: times of all chunks, in global order.
        returned_bytes: what each of them sends on.
        layout: the layout.
        num_micro_batches: micro-batches of a step.
    """
    timed = [
        ChunkSeconds(chunk.all_forward, chunk.all_backward, clock.transfer_seconds(num_bytes) if num_bytes else 0.0)
        for chunk, num_bytes in zip(chunks, returned_bytes, strict=True)
    ]
    return schedule_seconds(timed, layout.pipeline_size, num_micro_batches)


def step_seconds(
    schedule: ScheduleSeconds,
    chunks: Sequence[Seconds],
    layout: Layout,
    num_micro_batches: int,
    gradients: float,
    update: float,
) -> StepSeconds:
    """Split the time of a step by what the busiest pipeline rank does; see `StepSeconds`."""
    busiest = schedule.busy.index(max(schedule.busy))
    own = chunks[busiest :: layout.pipeline_size]
    exchanging = num_micro_batches * sum(chunk.exchanged_forward + chunk.exchanged_backward for chunk in own)
    busy = schedule.busy[busiest]
    return StepSeconds(busy - exchanging, exchanging, schedule.total - busy, gradients, update)


def exchanged_seconds(clock: Clock, exchanges: Counts, config: Config) -> float:
    """Return the time of a step's exchanges, less those that are overlapped with the model's passes."""
    parallel = config.parallel
    seconds = 0.0
    for collective, times in exchanges.collectives.items():
        is_overlapped = collective.group.endswith("data") and (
            parallel.overlap_param_gather if collective.kind == "allgather" else parallel.overlap_grad_reduce
        )
        seconds += 0.0 if is_overlapped else times * clock.exchange_seconds(collective)
    return seconds


def _beside_layers(chunk: ChunkCounts) -> Counts:
    head = [] if chunk.head is None else [chunk.head]
    return chunk.total.without([*chunk.layers.values(), *head])


def _own_flops(counts: Counts) -> int:
    """Return the FLOPs of a micro-batch that are not computed twice."""
    return counts.flops["forward"] + counts.flops["backward"]


def _traffic(
    stages: Sequence[StageCounts], spans: Mapping[str, Span], layout: Layout, num_micro_batches: int
) -> dict[str, Traffic]:
    """Return what the rank of the stage that sends most in a group sends there per step."""
    by_group: dict[str, list[Traffic]] = {}
    for stage in stages:
        sent: Counter[str] = Counter()
        crossing: Counter[str] = Counter()
        for chunk in stage.chunks:
            for collective, times in chunk.total.collectives.items():
                times *= num_micro_batches
                sent[collective.group] += collective.sent_bytes * times
                crossing[collective.group] += crossing_bytes(collective, spans.get(collective.group, Span())) * times
            passed = num_micro_batches * (chunk.returned_bytes + chunk.received_bytes)
            sent["pipeline"] += passed
            crossing["pipeline"] += passed if spans.get("pipeline", Span()).nodes > 1 else 0
        for collective, times in stage.step.exchanges.collectives.items():
            sent[collective.group] += collective.sent_bytes * times
            crossing[collective.group] += crossing_bytes(collective, spans.get(collective.group, Span())) * times
        for group in +sent:
            by_group.setdefault(group, []).append(Traffic(sent[group], crossing[group]))
    return {group: max(traffic, key=lambda entry: entry.sent) for group, traffic in by_group.items()}
