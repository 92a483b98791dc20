"""The time of megatron-core's pipeline schedules, 1F1B and interleaved, from the times of each chunk's passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_schedule_table

_ROUNDS = 4, 6  # simulated, of as many micro-batches as there are stages; all further rounds take equally long


@dataclass(frozen=True)
class ChunkSeconds:
    """The times of one micro-batch on one chunk.

    Attributes:
        forward: seconds of the forward pass.
        backward: seconds of the backward pass, with what is recomputed.
        sent: seconds in which what the chunk returns reaches the next one, and as many for its gradient.
    """

    forward: float
    backward: float
    sent: float = 0.0


@dataclass(frozen=True)
class Pass:
    """The forward or backward pass of one micro-batch on one chunk (global id)."""

    is_forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class ScheduleSeconds:
    """The time of a step's passes.

    Attributes:
        total: seconds from the first pass to the last.
        busy: seconds in which each pipeline rank computes.
    """

    total: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Part of the time in which an average pipeline rank waits."""
        return 1 - sum(self.busy) / len(self.busy) / self.total

    @property
    def imbalance(self) -> float:
        """The busiest rank's time over the mean of all."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


def order_of_passes(rank: int, pipeline_size: int, virtual_size: int, num_micro_batches: int) -> Iterator[Pass]:
    """Yield a pipeline rank's passes in megatron-core's order."""
    table = [(batch, stage) for batch, stage in get_schedule_table(num_micro_batches, virtual_size, pipeline_size)]
    forward = [Pass(True, stage * pipeline_size + rank, batch) for batch, stage in table]
    backward = [Pass(False, (virtual_size - 1 - stage) * pipeline_size + rank, batch) for batch, stage in table]
    ahead = passes_ahead(rank, pipeline_size, virtual_size, num_micro_batches)
    yield from forward[:ahead]
    for position in range(len(table) - ahead):
        yield forward[ahead + position]
        yield backward[position]
    yield from backward[len(table) - ahead :]


def passes_ahead(rank: int, pipeline_size: int, virtual_size: int, num_micro_batches: int) -> int:
    """Return the forward passes of a rank before its first backward pass's partner (megatron-core's warm-up)."""
    ahead = pipeline_size - rank - 1
    if virtual_size > 1:
        ahead = 2 * ahead + (virtual_size - 1) * pipeline_size
    return min(num_micro_batches * virtual_size, ahead)


def schedule_seconds(chunks: Sequence[ChunkSeconds], pipeline_size: int, num_micro_batches: int) -> ScheduleSeconds:
    """Return the time of a step's passes.

    Args:
        chunks: times of all chunks of the pipeline, in global order.
        pipeline_size: number of pipeline ranks.
        num_micro_batches: micro-batches of a step; with several chunks per rank a multiple of the pipeline size.
    """
    own = [chunks[rank::pipeline_size] for rank in range(pipeline_size)]
    busy = tuple(num_micro_batches * sum(chunk.forward + chunk.backward for chunk in held) for held in own)
    if pipeline_size == 1:
        return ScheduleSeconds(busy[0], busy)
    few, more = (rounds * pipeline_size for rounds in _ROUNDS)
    if num_micro_batches <= more:
        return ScheduleSeconds(_simulate(chunks, pipeline_size, num_micro_batches), busy)
    of_few, of_more = (_simulate(chunks, pipeline_size, simulated) for simulated in (few, more))
    each = max((of_more - of_few) / (more - few), max(busy) / num_micro_batches)
    return ScheduleSeconds(of_more + each * (num_micro_batches - more), busy)


def _simulate(chunks: Sequence[ChunkSeconds], pipeline_size: int, num_micro_batches: int) -> float:
    """Return when the last pass ends.

    Without interleaving a rank waits until what it sent has arrived; with it, sends are overlapped.
    """
    virtual_size, last = len(chunks) // pipeline_size, len(chunks) - 1
    orders = [
        list(order_of_passes(rank, pipeline_size, virtual_size, num_micro_batches)) for rank in range(pipeline_size)
    ]
    # When the inputs of a pass have arrived; the first chunk's are there from the beginning.
    arrived: dict[tuple[bool, int, int], float] = {(True, 0, batch): 0.0 for batch in range(num_micro_batches)}
    clocks, positions = [0.0] * pipeline_size, [0] * pipeline_size
    unfinished = sum(map(len, orders))
    while unfinished:
        before = unfinished
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                task = order[positions[rank]]
                ready = arrived.get((task.is_forward, task.chunk, task.micro_batch))
                if ready is None:
                    break
                seconds, step = chunks[task.chunk], 1 if task.is_forward else -1
                end = max(ready, clocks[rank]) + (seconds.forward if task.is_forward else seconds.backward)
                clocks[rank], receiver = end, task.chunk + step
                if task.is_forward and task.chunk == last:
                    arrived[False, last, task.micro_batch] = end
                elif receiver >= 0:
                    sent = seconds.sent if task.is_forward else chunks[receiver].sent
                    arrived[task.is_forward, receiver, task.micro_batch] = end + sent
                    clocks[rank] = end if virtual_size > 1 else end + sent
                positions[rank] += 1
                unfinished -= 1
        assert unfinished < before, "passes wait for each other"
    return max(clocks)
