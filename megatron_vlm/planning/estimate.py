"""Quick estimates of layouts, put together from parts that were traced once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate

from megatron_vlm.config import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.memory import passes_alive
from megatron_vlm.planning.parts import Parts, TowerPart
from megatron_vlm.planning.plan import StepSeconds, exchanged_seconds, schedule_of, step_seconds
from megatron_vlm.planning.recorder import Collective, Counts
from megatron_vlm.planning.schedule import ScheduleSeconds
from megatron_vlm.planning.split_layers import balanced_counts, tower_counts
from megatron_vlm.planning.stages import Held
from megatron_vlm.planning.state_bytes import FP32_BYTES, optimizer_bytes, value_bytes
from megatron_vlm.planning.step_time import Clock, Seconds, data_shards


@dataclass(frozen=True)
class Estimate:
    """What is quickly predicted of a layout.

    Attributes:
        step: the time of a step.
        most_bytes: memory of the fullest pipeline rank.
        fixed_bytes: its parameters, gradients and optimizer state.
    """

    config: Config
    layout: Layout
    step: StepSeconds
    most_bytes: int
    fixed_bytes: int


@dataclass
class _Sums:
    """Sums over the decoder layers before each, so that those of consecutive layers are differences."""

    seconds: list[Seconds]
    kept_bytes: list[int]
    held: list[Held]


class Estimator:
    """Estimates layouts whose ranks hold the same parts.

    Args:
        parts: the parts.
        clock: where groups are, and how fast the hardware is.
    """

    def __init__(self, parts: Parts, clock: Clock) -> None:
        self._parts, self._clock = parts, clock
        self._first, self._last, self._frame = (
            (clock.seconds(part.work), Held.of(part.parameters)) for part in (parts.first, parts.last, parts.frame)
        )

        self._layer_working_bytes = max(part.working_bytes for part in parts.layers)

    @cached_property
    def _sums(self) -> _Sums:
        known: dict[int, tuple[Seconds, int, Held]] = {}
        layers = []
        for part in self._parts.layers:
            if id(part) not in known:
                kept_bytes = part.kept_bytes + self._parts.hidden_bytes
                known[id(part)] = self._clock.seconds(part.work), kept_bytes, Held.of(part.parameters)
            layers.append(known[id(part)])
        return _Sums(
            list(accumulate((seconds for seconds, _, _ in layers), initial=Seconds())),
            list(accumulate((kept_bytes for _, kept_bytes, _ in layers), initial=0)),
            list(accumulate((held for _, _, held in layers), Held.plus, initial=Held())),
        )

    @property
    def _layer_seconds(self) -> float:
        """Seconds of a micro-batch on an average decoder layer."""
        return self._sums.seconds[-1].total / len(self._parts.layers)

    def balanced(self, layout: Layout, tower: Sequence[int]) -> list[int]:
        """Return decoder layers per chunk that even out the ranks of a layout.

        Args:
            layout: the layout, whose own layers make no difference.
            tower: the tower's layers on each chunk that has any; empty for a whole tower.
        """
        placed = dataclasses.replace(layout, tower_counts=tuple(tower))
        tower_seconds = [self._tower(placed, index).seconds.total for index in range(placed.embedding_chunk + 1)]
        return balanced_counts(
            layout.num_layers,
            len(layout.chunks),
            self._layer_seconds,
            tower_seconds,
            self._last[0].total,
            layout.pipeline_size,
        )

    def chunks_of_tower(self, num_chunks: int) -> float:
        """Return the number of chunks that would take the time of embedding and towers, if all took equally long."""
        return self._first[0].total / self._mean_seconds(num_chunks)

    def spread_tower(self, num_layers: int, num_holders: int, num_chunks: int) -> list[int]:
        """Return the tower's layers on each of the chunks that have any; see `tower_counts`."""
        start, end = self._tower_lines["start"], self._tower_lines["end"]
        return tower_counts(
            num_layers,
            num_holders,
            start.at(0).seconds.total,
            start.each.seconds.total,
            end.at(0).seconds.total,
            self._mean_seconds(num_chunks),
        )

    def _mean_seconds(self, num_chunks: int) -> float:
        return (self._sums.seconds[-1].total + self._first[0].total + self._last[0].total) / num_chunks

    def estimate(self, config: Config, layout: Layout, enough: float = math.inf) -> Estimate:
        """Estimate a layout that `check_layout` returned for a configuration.

        Args:
            config: the configuration.
            layout: the layout.
            enough: seconds of a step; where the busiest rank alone takes longer, its waiting is left out.
        """
        chunks = [self._chunk(layout, index) for index in range(len(layout.chunks))]
        num_micro_batches = config.train.num_micro_batches(layout.data_size)
        seconds = [chunk.seconds for chunk in chunks]
        fullest, fixed, gradients, update = 0, 0, 0.0, 0.0
        for rank in range(layout.pipeline_size):
            own = chunks[rank :: layout.pipeline_size]
            held = reduce(Held.plus, (chunk.held for chunk in own))
            state = _state_bytes(config, layout, held)
            kept = sum(chunk.kept_bytes for chunk in own) / len(own)
            head_bytes = self._parts.last.kept_bytes if rank == layout.pipeline_size - 1 else 0
            alive = passes_alive(config, layout, rank)
            working = max(chunk.working_bytes for chunk in own)
            total = state + math.ceil(alive * kept) + head_bytes + working
            if total > fullest:
                fullest, fixed = total, state
            gradients = max(gradients, exchanged_seconds(self._clock, _exchanges(config, layout, held), config))
            seconds_of_rank = self._clock.update_seconds(sum(_shards(config, layout, held)))
            update = max(update, seconds_of_rank + self._clock.muon_seconds(config, layout, held))
        busy = [
            num_micro_batches * sum(chunk.total for chunk in seconds[rank :: layout.pipeline_size])
            for rank in range(layout.pipeline_size)
        ]
        if max(busy) + gradients + update > enough:
            schedule = ScheduleSeconds(max(busy), tuple(busy))
        else:
            received = [self._received_bytes(layout, index) for index in range(len(chunks))]
            returned_bytes = [*received[1:], 0]
            schedule = schedule_of(self._clock, seconds, returned_bytes, layout, num_micro_batches)
        step = step_seconds(schedule, seconds, layout, num_micro_batches, gradients, update)
        return Estimate(config, layout, step, fullest, fixed)

    def _received_bytes(self, layout: Layout, index: int) -> int:
        """Return what a chunk receives from the one before it; 0 for the first."""
        if index == 0:
            return 0
        if index <= layout.embedding_chunk:
            return self._parts.tower().received_bytes[self._first_tower_layer(layout, index)]
        return self._parts.received_bytes[layout.first_layer(index)]

    def _first_tower_layer(self, layout: Layout, index: int) -> int:
        """Return the first of a chunk's layers of the tower, or the last layer where none follows."""
        return min(sum(layout.tower_counts[:index]), sum(layout.tower_counts) - 1)

    def _chunk(self, layout: Layout, index: int) -> _Chunk:
        parts, sums, layers = self._parts, self._sums, layout.chunks[index]
        start, end = layout.first_layer(index), layout.first_layer(index) + len(layers)
        embeds, last = index == layout.embedding_chunk, index == len(layout.chunks) - 1
        seconds = _difference(sums.seconds[end], sums.seconds[start])
        kept_bytes, held = sums.kept_bytes[end] - sums.kept_bytes[start], sums.held[end].minus(sums.held[start])
        working_bytes = self._layer_working_bytes if layers else 0
        if index <= layout.embedding_chunk:
            tower = self._tower(layout, index)
            seconds, held = seconds + tower.seconds, held.plus(tower.held)
            kept_bytes += tower.kept_bytes + self._received_bytes(layout, index)
            working_bytes = max(working_bytes, tower.working_bytes)
        else:
            # The first layer's input is what is received.
            kept_bytes += self._received_bytes(layout, index) - (parts.hidden_bytes if layers else 0)
        if last:
            seconds, held = seconds + self._last[0], held.plus(self._last[1])
            working_bytes = max(working_bytes, parts.last.working_bytes)
            if embeds:  # a tied embedding is one
                shared = {
                    name: entry for name, entry in parts.last.parameters.items() if name in parts.first.parameters
                }
                held = held.minus(Held.of(shared))
        elif layers:
            seconds, kept_bytes = seconds + self._frame[0], kept_bytes + parts.frame.kept_bytes
            held = held if embeds else held.plus(self._frame[1])
        return _Chunk(seconds, kept_bytes, working_bytes, held)

    def _tower(self, layout: Layout, index: int) -> _Chunk:
        """Return what a chunk up to the embedding has beside decoder layers, without what it receives."""
        if layout.embedding_chunk == 0:
            first = self._parts.first
            return _Chunk(self._first[0], first.kept_bytes, first.working_bytes, self._first[1])
        role = {0: "start", layout.embedding_chunk: "end"}.get(index, "middle")
        return self._tower_lines[role].at(layout.tower_counts[index])

    @cached_property
    def _tower_lines(self) -> dict[str, _Line]:
        """What chunks of a spread tower do, by where they are."""
        tower = self._parts.tower()
        parts = {"start": tower.start, "middle": tower.middle, "end": tower.end}
        return {role: _Line.through(part, self._clock) for role, part in parts.items()}


@dataclass(frozen=True)
class _Chunk:
    """What a micro-batch does on a chunk; `kept_bytes` leaves out what the head keeps."""

    seconds: Seconds
    kept_bytes: int
    working_bytes: int
    held: Held


@dataclass(frozen=True)
class _Line:
    """What a micro-batch does on a chunk with a part of a spread tower, whose layers are alike.

    Attributes:
        num_layers: a number of the tower's layers.
        chunk: the chunk with as many, without what it receives.
        each: what every further layer adds, and the working memory with it.
    """

    num_layers: int
    chunk: _Chunk
    each: _Chunk

    @staticmethod
    def through(part: TowerPart, clock: Clock) -> _Line:
        """Return the line through what was traced."""
        (few, many), (fewer, more) = part.nums_layers, part.traced
        seconds, added = (clock.seconds(traced.work) for traced in part.traced)
        between = max(1, many - few)
        each = _Chunk(
            _difference(added, seconds).times(1 / between),
            (more.kept_bytes - fewer.kept_bytes) // between,
            more.working_bytes,
            Held(*(value // between for value in Held.of(more.parameters).minus(Held.of(fewer.parameters)))),
        )
        return _Line(few, _Chunk(seconds, fewer.kept_bytes, fewer.working_bytes, Held.of(fewer.parameters)), each)

    def at(self, num_layers: int) -> _Chunk:
        """Return the chunk with a number of the tower's layers."""
        chunk, added = self.chunk, num_layers - self.num_layers
        if added == 0:
            return chunk
        return _Chunk(
            chunk.seconds + self.each.seconds.times(added),
            max(0, chunk.kept_bytes + self.each.kept_bytes * added),
            self.each.working_bytes,
            chunk.held.plus(self.each.held.times(added)),
        )


def _difference(later: Seconds, earlier: Seconds) -> Seconds:
    return Seconds(
        later.forward - earlier.forward,
        later.backward - earlier.backward,
        later.exchanged_forward - earlier.exchanged_forward,
        later.exchanged_backward - earlier.exchanged_backward,
    )


def _shards(config: Config, layout: Layout, held: Held) -> tuple[int, int]:
    """Return the elements, dense and of experts, whose optimizer state a rank has."""
    of_dense, of_experts = data_shards(config, layout)
    return -(-held.dense // of_dense), -(-held.experts // of_experts)


def _state_bytes(config: Config, layout: Layout, held: Held) -> int:
    trained, (dense, experts) = held.dense + held.experts, _shards(config, layout, held)
    matrices = dense * held.matrices // max(held.dense, 1) + experts
    return (
        (trained + held.frozen) * value_bytes(config)
        + trained * FP32_BYTES
        + optimizer_bytes(config, dense + experts, matrices)
    )


def _exchanges(config: Config, layout: Layout, held: Held) -> Counts:
    """Return the exchanges of gradients and parameters, without padding."""
    counts = Counts()
    num_copies = 1 if layout.embedding_rank == layout.pipeline_size - 1 else 2
    for name, size, values in (("tensor", layout.tensor_size, held.partial), ("pipeline", num_copies, held.copied)):
        if values and size > 1:
            counts.collectives[Collective("step", "allreduce", name, size, values * FP32_BYTES)] += 1
    if config.optimizer.name == "muon":
        for name, size, values in (
            ("tensor", layout.tensor_size, held.gathered // data_shards(config, layout)[0]),
            ("expert-tensor", layout.expert_tensor_size, held.gathered_experts // data_shards(config, layout)[1]),
        ):
            if size > 1 and values:
                counts.collectives[Collective("step", "allgather", name, size, values * FP32_BYTES)] += 1
    kinds = {"allreduce": FP32_BYTES}
    if config.parallel.use_distributed_optimizer:
        kinds = {"reduce_scatter": FP32_BYTES, "allgather": value_bytes(config)}
    data_size = layout.data_size * layout.context_size
    for name, size, values in (("data", data_size, held.dense), ("expert data", layout.expert_data_size, held.experts)):
        for kind, element_bytes in kinds.items():
            if size > 1 and values:
                counts.collectives[Collective("step", kind, name, size, values * element_bytes)] += 1
    return counts
