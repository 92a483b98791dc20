"""Quick estimates of layouts, put together from parts that were traced once."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import NamedTuple

from megatron_vlm.config import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.memory import passes_alive
from megatron_vlm.planning.parts import Part, Parts
from megatron_vlm.planning.plan import StepSeconds, exchanged_seconds, schedule_of, step_seconds
from megatron_vlm.planning.recorder import Collective, Counts
from megatron_vlm.planning.schedule import ScheduleSeconds
from megatron_vlm.planning.state_bytes import FP32_BYTES, optimizer_bytes, value_bytes
from megatron_vlm.planning.step_time import Clock, Seconds


class Held(NamedTuple):
    """Numbers of elements of parameters.

    Attributes:
        dense: of those that train, and are no experts'.
        experts: of experts that train.
        frozen: of all others.
        partial: of dense ones whose gradients are summed over the tensor ranks.
        copied: of those of which the first and the last stage have a copy.
    """

    dense: int = 0
    experts: int = 0
    frozen: int = 0
    partial: int = 0
    copied: int = 0

    def plus(self, other: Held) -> Held:
        """Return the sums."""
        return Held(*map(operator.add, self, other))

    def minus(self, other: Held) -> Held:
        """Return the differences."""
        return Held(*map(operator.sub, self, other))

    @staticmethod
    def of(part: Part) -> Held:
        """Count a part's parameters."""
        counted = dict.fromkeys(Held._fields, 0)
        for entry in part.parameters.values():
            kind = ("experts" if entry.is_expert else "dense") if entry.trains else "frozen"
            counted[kind] += entry.num_values
            if kind == "dense":
                counted["partial"] += entry.num_values * entry.is_partial
                counted["copied"] += entry.num_values * (entry.stages == "embedding_and_head")
        return Held(**counted)


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
            (clock.seconds(part.work), Held.of(part)) for part in (parts.first, parts.last, parts.frame)
        )

        self._layer_working_bytes = max(part.working_bytes for part in parts.layers)

    @cached_property
    def _sums(self) -> _Sums:
        known: dict[int, tuple[Seconds, int, Held]] = {}
        layers = []
        for part in self._parts.layers:
            if id(part) not in known:
                kept_bytes = part.kept_bytes + self._parts.hidden_bytes
                known[id(part)] = self._clock.seconds(part.work), kept_bytes, Held.of(part)
            layers.append(known[id(part)])
        return _Sums(
            list(accumulate((seconds for seconds, _, _ in layers), initial=Seconds())),
            list(accumulate((kept_bytes for _, kept_bytes, _ in layers), initial=0)),
            list(accumulate((held for _, _, held in layers), Held.plus, initial=Held())),
        )

    @property
    def layer_seconds(self) -> float:
        """Seconds of a micro-batch on an average decoder layer."""
        return self._sums.seconds[-1].total / len(self._parts.layers)

    @property
    def first_seconds(self) -> float:
        """Seconds of a micro-batch on embedding and towers."""
        return self._first[0].total

    @property
    def last_seconds(self) -> float:
        """Seconds of a micro-batch on final norm and head."""
        return self._last[0].total

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
            update = max(update, self._clock.update_seconds(sum(_shards(config, layout, held))))
        busy = [
            num_micro_batches * sum(chunk.total for chunk in seconds[rank :: layout.pipeline_size])
            for rank in range(layout.pipeline_size)
        ]
        if max(busy) + gradients + update > enough:
            schedule = ScheduleSeconds(max(busy), tuple(busy))
        else:
            returned_bytes = [self._received_bytes(layout, index + 1) for index in range(len(chunks))]
            schedule = schedule_of(self._clock, seconds, returned_bytes, layout, num_micro_batches)
        step = step_seconds(schedule, seconds, layout, num_micro_batches, gradients, update)
        return Estimate(config, layout, step, fullest, fixed)

    def _received_bytes(self, layout: Layout, index: int) -> int:
        """Return what a chunk receives from the one before it; 0 for the first, and behind the last."""
        if not 0 < index < len(layout.chunks):
            return 0
        return self._parts.received_bytes[layout.first_layer(index)]

    def _chunk(self, layout: Layout, index: int) -> _Chunk:
        parts, sums, layers = self._parts, self._sums, layout.chunks[index]
        start, end = layout.first_layer(index), layout.first_layer(index) + len(layers)
        first, last = index == 0, index == len(layout.chunks) - 1
        seconds = _difference(sums.seconds[end], sums.seconds[start])
        kept_bytes, held = sums.kept_bytes[end] - sums.kept_bytes[start], sums.held[end].minus(sums.held[start])
        working_bytes = self._layer_working_bytes if layers else 0
        if first:
            seconds, held = seconds + self._first[0], held.plus(self._first[1])
            kept_bytes += parts.first.kept_bytes
            working_bytes = max(working_bytes, parts.first.working_bytes)
        else:
            # The first layer's input is what is received.
            kept_bytes += self._received_bytes(layout, index) - (parts.hidden_bytes if layers else 0)
        if last:
            seconds, held = seconds + self._last[0], held.plus(self._last[1])
            working_bytes = max(working_bytes, parts.last.working_bytes)
            if first:  # a tied embedding is one
                shared = {
                    name: entry for name, entry in parts.last.parameters.items() if name in parts.first.parameters
                }
                held = held.minus(Held.of(Part(shared, Counts(), 0, 0)))
        elif layers:
            seconds, kept_bytes = seconds + self._frame[0], kept_bytes + parts.frame.kept_bytes
            held = held if first else held.plus(self._frame[1])
        return _Chunk(seconds, kept_bytes, working_bytes, held)


@dataclass(frozen=True)
class _Chunk:
    """What a micro-batch does on a chunk; `kept_bytes` leaves out what the head keeps."""

    seconds: Seconds
    kept_bytes: int
    working_bytes: int
    held: Held


def _difference(later: Seconds, earlier: Seconds) -> Seconds:
    return Seconds(
        later.forward - earlier.forward,
        later.backward - earlier.backward,
        later.exchanged_forward - earlier.exchanged_forward,
        later.exchanged_backward - earlier.exchanged_backward,
    )


def _shards(config: Config, layout: Layout, held: Held) -> tuple[int, int]:
    """Return the elements, dense and of experts, whose optimizer state a rank has."""
    if not config.parallel.use_distributed_optimizer:
        return held.dense, held.experts
    return -(-held.dense // (layout.data_size * layout.context_size)), -(-held.experts // layout.expert_data_size)


def _state_bytes(config: Config, layout: Layout, held: Held) -> int:
    trained = held.dense + held.experts
    return (
        (trained + held.frozen) * value_bytes(config)
        + trained * FP32_BYTES
        + optimizer_bytes(config, sum(_shards(config, layout, held)))
    )


def _exchanges(config: Config, layout: Layout, held: Held) -> Counts:
    """Return the exchanges of gradients and parameters, without padding."""
    counts = Counts()
    for name, size, values in (("tensor", layout.tensor_size, held.partial), ("pipeline", 2, held.copied)):
        if values and size > 1 and (name == "tensor" or layout.pipeline_size > 1):
            counts.collectives[Collective("step", "allreduce", name, size, values * FP32_BYTES)] += 1
    kinds = {"allreduce": FP32_BYTES}
    if config.parallel.use_distributed_optimizer:
        kinds = {"reduce_scatter": FP32_BYTES, "allgather": value_bytes(config)}
    data_size = layout.data_size * layout.context_size
    for name, size, values in (("data", data_size, held.dense), ("expert data", layout.expert_data_size, held.experts)):
        for kind, element_bytes in kinds.items():
            if size > 1 and values:
                counts.collectives[Collective("step", kind, name, size, values * element_bytes)] += 1
    return counts


def balanced_counts(
    num_layers: int,
    num_chunks: int,
    layer_seconds: float,
    first_seconds: float,
    last_seconds: float,
    pipeline_size: int,
) -> list[int]:
    """Return numbers of decoder layers per chunk that even out the ranks, with fewer beside towers and head.

    Args:
        num_layers: decoder layers of the model.
        num_chunks: pipeline size times chunks per rank.
        layer_seconds: time of a layer.
        first_seconds: time of embedding and towers.
        last_seconds: time of the head.
        pipeline_size: pipeline ranks.
    """
    even = -(-num_layers // num_chunks)
    best: tuple[float, float, list[int]] | None = None
    for first in range(min(even, num_layers) + 1):
        lasts = range(min(even, num_layers - first) + 1) if num_chunks > 2 else [num_layers - first]
        for last in lasts:
            middle = _spread(num_layers - first - last, num_chunks - 2)
            counts = [first, *middle, last]
            loads = [layer_seconds * sum(counts[rank::pipeline_size]) for rank in range(pipeline_size)]
            loads[0] += first_seconds
            loads[-1] += last_seconds
            key = max(loads), max(counts) - min(counts)
            if best is None or key < best[:2]:
                best = *key, counts
    assert best is not None
    return best[2]


def _spread(num_layers: int, num_chunks: int) -> Sequence[int]:
    """Return equal numbers, with the rest on the chunks in the middle."""
    if not num_chunks:
        return []
    each, rest = divmod(num_layers, num_chunks)
    first_larger = (num_chunks - rest) // 2
    return [each + (first_larger <= chunk < first_larger + rest) for chunk in range(num_chunks)]
