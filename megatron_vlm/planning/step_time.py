"""Predicts the time of passes and exchanges from traced counts and a table of hardware.

A matmul or an attention takes as long as its FLOPs at the assumed fraction of the peak, or as its bytes at that of the
memory's bandwidth, whichever is more; any other operator takes its bytes. A device waits for a host that cannot start
operators fast enough. Exchanges of a layer are not overlapped with anything, as in the code. An exchange takes the
slowest of the links that its group crosses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_vlm.config import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.placement import Node, place_groups
from megatron_vlm.planning.hardware import Hardware
from megatron_vlm.planning.recorder import Collective, Counts, Operation
from megatron_vlm.planning.stages import Held
from megatron_vlm.planning.state_bytes import FP32_BYTES

# Names of groups of ranks in traces, and of the axis along which `placement` describes them.
_AXES = {
    "tensor": "tensor",
    "context": "context",
    "data": "data",
    "pipeline": "pipeline",
    "expert": "expert",
    "expert-tensor": "expert tensor",
    "expert data": "expert data",
}
_OPTIMIZER_PASSES = 7  # AdamW reads gradient, main weight, two moments, and writes the last three, in fp32


# Of matmuls in bf16, TF32 and fp32, next to those in bf16 (data sheets of A100, H100, H200; B200's fp32 is half of it).
_MATMUL_RATES = {"medium": 1.0, "high": 0.5, "highest": 0.065}


@dataclass(frozen=True)
class Span:
    """Where the ranks of a group are: on how many nodes, and how many on each."""

    nodes: int = 1
    ranks_per_node: int = 1


def spans_of(layout: Layout, hardware: Hardware) -> dict[str, Span]:
    """Return where the groups of a layout are, by the names that traces give them, on nodes filled one by one."""
    size = hardware.gpus_per_node
    nodes = [
        Node(str(first), range(first, min(first + size, layout.world_size)))
        for first in range(0, layout.world_size, size)
    ]
    placed = {group.name: group for group in place_groups(layout, nodes)}
    spans = {
        name: Span(group.most_nodes, -(-group.size // group.most_nodes))
        for name, axis in _AXES.items()
        if (group := placed.get(axis)) is not None
    }
    shared = layout.expert_size * layout.expert_tensor_size
    spans["experts"] = Span(-(-shared // size), min(shared, size))
    return spans


@dataclass(frozen=True)
class Seconds:
    """The time of a micro-batch on a part of a chunk; backward passes contain what is recomputed.

    Attributes:
        forward: computing, in the forward pass.
        backward: computing, in the backward pass.
        exchanged_forward: exchanges with other ranks, in the forward pass.
        exchanged_backward: exchanges, in the backward pass.
    """

    forward: float = 0.0
    backward: float = 0.0
    exchanged_forward: float = 0.0
    exchanged_backward: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward,
            self.backward + other.backward,
            self.exchanged_forward + other.exchanged_forward,
            self.exchanged_backward + other.exchanged_backward,
        )

    def times(self, factor: float) -> Seconds:
        """Return multiples."""
        return Seconds(
            factor * self.forward,
            factor * self.backward,
            factor * self.exchanged_forward,
            factor * self.exchanged_backward,
        )

    @property
    def all_forward(self) -> float:
        """The forward pass."""
        return self.forward + self.exchanged_forward

    @property
    def all_backward(self) -> float:
        """The backward pass."""
        return self.backward + self.exchanged_backward

    @property
    def total(self) -> float:
        """Both passes."""
        return self.all_forward + self.all_backward


@dataclass
class Clock:
    """Predicts times on a kind of hardware, for groups that are where `spans` says.

    Attributes:
        spans: where groups are, by name; inside a node if absent.
    """

    hardware: Hardware
    spans: Mapping[str, Span] = field(default_factory=dict)

    def seconds(self, counts: Counts) -> Seconds:
        """Return the time of a micro-batch."""
        device, host, exchanged = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        launch = self.hardware.launch_microseconds * 1e-6
        for operation, times in counts.operations.items():
            phase = operation.phase != "forward"
            device[phase] += times * self.operation_seconds(operation)
            host[phase] += times * launch
        for collective, times in counts.collectives.items():
            exchanged[collective.phase != "forward"] += times * self.exchange_seconds(collective)
        return Seconds(*map(max, device, host), *exchanged)

    def operation_seconds(self, operation: Operation) -> float:
        """Return the time of an operator on the device."""
        hardware = self.hardware
        moved = operation.moved_bytes / (hardware.memory_gb_per_second * 1e9 * hardware.memory_fraction)
        if operation.kind == "other":
            return moved
        is_matmul = operation.kind == "matmul"
        fraction = hardware.matmul_fraction if is_matmul else hardware.attention_fraction
        return max(moved, operation.flops / (hardware.bf16_tflops * 1e12 * fraction))

    def exchange_seconds(self, collective: Collective) -> float:
        """Return the time of a collective."""
        hardware, span = self.hardware, self.spans.get(collective.group, Span())
        node, network = (
            bandwidth * 1e9 * hardware.link_fraction
            for bandwidth in (hardware.node_gb_per_second, hardware.network_gb_per_second)
        )
        latency = hardware.latency_microseconds * 1e-6
        if span.nodes == 1:
            return latency + collective.sent_bytes / node
        if collective.kind == "alltoall":
            return latency + max(crossing_bytes(collective, span) / network, collective.sent_bytes / node)
        return latency + collective.sent_bytes / min(node, span.ranks_per_node * network)

    def transfer_seconds(self, num_bytes: int) -> float:
        """Return the time in which a tensor reaches the next pipeline stage."""
        hardware = self.hardware
        is_inside = self.spans.get("pipeline", Span()).nodes == 1
        bandwidth = hardware.node_gb_per_second if is_inside else hardware.network_gb_per_second
        return hardware.latency_microseconds * 1e-6 + num_bytes / (bandwidth * 1e9 * hardware.link_fraction)

    def update_seconds(self, num_values: int) -> float:
        """Return the time of the optimizer's update of as many elements."""
        hardware = self.hardware
        moved = num_values * FP32_BYTES * _OPTIMIZER_PASSES
        return moved / (hardware.memory_gb_per_second * 1e9 * hardware.memory_fraction)

    def muon_seconds(self, config: Config, layout: Layout, held: Held) -> float:
        """Return the time in which Muon orthogonalises an average data rank's matrices; 0 with other optimizers."""
        optimizer, (of_dense, of_experts) = config.optimizer, data_shards(config, layout)
        if optimizer.name != "muon":
            return 0.0
        flops = optimizer.muon_num_ns_steps * (held.muon_flops / of_dense + held.muon_flops_experts / of_experts)
        rate = self.hardware.bf16_tflops * 1e12 * self.hardware.matmul_fraction
        return flops / (rate * _MATMUL_RATES[optimizer.muon_fp32_matmul_prec])


def data_shards(config: Config, layout: Layout) -> tuple[int, int]:
    """Return over how many ranks the optimizer state of dense parameters is sharded, and that of experts."""
    if not config.parallel.use_distributed_optimizer:
        return 1, 1
    return layout.data_size * layout.context_size, layout.expert_data_size


def crossing_bytes(collective: Collective, span: Span) -> int:
    """Return what of a rank's bytes goes to another node: in a ring, the ranks of a node share what crosses."""
    if span.nodes == 1:
        return 0
    if collective.kind == "alltoall":
        return collective.sent_bytes * (collective.size - span.ranks_per_node) // (collective.size - 1)
    return math.ceil(collective.sent_bytes / span.ranks_per_node)
