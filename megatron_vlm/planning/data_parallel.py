"""What data parallelism holds and exchanges once per step: megatron-core's own layout of buffers, and our sums.

Gradients and parameters lie in buffers, whose buckets are padded so that each data rank has an equal shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.config import Config, ParallelSettings
from megatron_vlm.families.build import buffer_layout, data_parallel_config
from megatron_vlm.parallel.gradients import sum_parts
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import replica_group
from megatron_vlm.planning.recorder import Collective, Counts, Recorder
from megatron_vlm.planning.state_bytes import FP32_BYTES, value_bytes

_GROUPS = {
    "dp_cp": "data",
    "expt_dp": "expert data",
    "tp": "tensor",
    "expt_tp": "expert-tensor",
    "embd": "pipeline",
    "pp": "pipeline",
}


@dataclass(frozen=True)
class StepCounts:
    """What a rank holds for data parallelism, and sends when the gradients of a step are complete.

    Attributes:
        parameter_bytes: memory of the parameters.
        gradient_bytes: memory of the gradients.
        dense_shards: elements of dense parameters whose optimizer state each data rank has; one entry if it is not
            sharded.
        matrix_shards: elements of matrices among them, likewise.
        expert_shards: elements of experts whose optimizer state each expert data rank has, likewise.
        exchanges: sums of gradients, gathers of parameters where the optimizer is distributed, and of Muon's momentum
            over tensor ranks (an average data rank's). Single numbers (label tokens, losses, the gradient norm) are
            left out.
    """

    parameter_bytes: int
    gradient_bytes: int
    dense_shards: tuple[int, ...]
    matrix_shards: tuple[int, ...]
    expert_shards: tuple[int, ...]
    exchanges: Counts


@dataclass(frozen=True)
class _Buffer:
    """One buffer of a chunk.

    Attributes:
        group: process group of the ranks that hold copies.
        positions: first and last position of every parameter.
        matrices: those of matrices among them.
        buckets: first and last position of every bucket.
    """

    is_expert: bool
    group: torch.distributed.ProcessGroup
    positions: list[tuple[int, int]]
    matrices: list[tuple[int, int]]
    buckets: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Elements, with padding."""
        return self.buckets[-1][1]

    def shards(self, size: int, positions: list[tuple[int, int]]) -> list[int]:
        """Return how many elements at these positions are in each rank's shard of the buckets."""
        owned = [0] * size
        for first, last in self.buckets:
            length = (last - first) // size
            for start, end in ((start - first, end - first) for start, end in positions if first <= start < last):
                for rank in range(start // length, -(-end // length)):
                    owned[rank] += min(end, (rank + 1) * length) - max(start, rank * length)
        return owned


def count_step(config: Config, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> StepCounts:
    """Count what data parallelism adds to a rank's chunks; call it where the chunks were built.

    Args:
        config: a validated configuration.
        chunks: the chunks, whose parameters require gradients where they train.
        groups: this rank's process groups.
    """
    is_sharded = config.parallel.use_distributed_optimizer
    buffers = [
        buffer for index, chunk in enumerate(chunks) for buffer in _buffers(config.parallel, chunk, index, groups)
    ]
    dense, experts, matrices = (
        _shards_of(parts, is_sharded)
        for parts in (
            [(buffer, buffer.positions) for buffer in buffers if not buffer.is_expert],
            [(buffer, buffer.positions) for buffer in buffers if buffer.is_expert],
            [(buffer, buffer.matrices) for buffer in buffers if not buffer.is_expert],
        )
    )
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    # The distributed optimizer keeps parameters in buffers too.
    trained = sum(buffer.length for buffer in buffers)
    return StepCounts(
        parameter_bytes=(frozen + trained) * value_bytes(config),
        gradient_bytes=trained * FP32_BYTES,
        dense_shards=dense,
        matrix_shards=matrices,
        expert_shards=experts,
        exchanges=_exchanges(config, chunks, buffers, groups),
    )


def _shards_of(parts: list[tuple[_Buffer, list[tuple[int, int]]]], is_sharded: bool) -> tuple[int, ...]:
    """Return how many elements at positions of buffers each data rank has; one entry if they are not sharded."""
    shards = [buffer.shards(buffer.group.size() if is_sharded else 1, positions) for buffer, positions in parts]
    return tuple(map(sum, zip(*shards, strict=True))) or (0,)


def _buffers(
    parallel: ParallelSettings, chunk: torch.nn.Module, index: int, groups: ProcessGroupCollection
) -> Iterator[_Buffer]:
    """Yield the buffers that `DistributedDataParallel` makes for a rank's chunk with this index."""
    ddp_config = data_parallel_config(
        parallel.use_distributed_optimizer, parallel.overlap_grad_reduce, parallel.overlap_param_gather
    )
    layouts = buffer_layout(chunk, index, ddp_config, groups).layouts
    for key, layout in layouts.items():
        group = groups.expt_dp if key.is_expert_parallel else groups.dp_cp
        entries = {parameter: (start, end) for parameter, (start, end, *_) in layout.param_index_map.items()}
        matrices = [position for parameter, position in entries.items() if spec_of(parameter).kind == "matrix"]
        yield _Buffer(key.is_expert_parallel, group, list(entries.values()), matrices, list(layout.bucket_indices))


def _exchanges(
    config: Config, chunks: Sequence[torch.nn.Module], buffers: Sequence[_Buffer], groups: ProcessGroupCollection
) -> Counts:
    """Count what megatron-core's data parallelism exchanges, and run our sums of gradients."""
    names = {
        group.group_name: name for key, name in reversed(_GROUPS.items()) if (group := getattr(groups, key)) is not None
    }
    for chunk in chunks:
        for parameter in chunk.parameters():
            spec = spec_of(parameter)
            if parameter.requires_grad and (spec.partial or spec.stages != "one"):
                parameter.main_grad = torch.empty_like(  # type: ignore[attr-defined]
                    parameter, dtype=torch.float32, requires_grad=False
                )
    recorder = Recorder(names)
    with recorder:
        sum_parts(chunks, groups)
    counts = Counts()
    for collective, times in recorder.counts.collectives.items():
        counts.collectives[collective._replace(phase="step")] += times
    if config.optimizer.name == "muon":
        counts.collectives += _momentum_gathers(config, chunks, groups, names)
    for buffer in buffers:
        size = buffer.group.size()
        if size == 1:
            continue
        name = names[buffer.group.group_name]
        kinds = {"allreduce": FP32_BYTES}
        if config.parallel.use_distributed_optimizer:
            kinds = {"reduce_scatter": FP32_BYTES, "allgather": value_bytes(config)}
        for first, last in buffer.buckets:
            for kind, element_bytes in kinds.items():
                counts.collectives[Collective("step", kind, name, size, (last - first) * element_bytes)] += 1
    return counts


def _momentum_gathers(
    config: Config, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, names: Mapping[str, str]
) -> Counter[Collective]:
    """Count what Muon gathers of matrices that are split over tensor ranks."""
    gathers: Counter[Collective] = Counter()
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad):
        spec = spec_of(parameter)
        ranks = groups.expt_tp if spec.is_expert else groups.tp
        if spec.kind == "matrix" and spec.tensor_dim is not None and ranks.size() > 1:
            sharing = replica_group(parameter, groups).size() if config.parallel.use_distributed_optimizer else 1
            payload_bytes = parameter.numel() * ranks.size() * FP32_BYTES // sharing
            gathers[Collective("step", "allgather", names[ranks.group_name], ranks.size(), payload_bytes)] += 1
    return gathers
