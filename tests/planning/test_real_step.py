"""What a plan says of exchanges and of parameters, gradients and optimizer state, against a real step on gloo ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlm import platform
from megatron_vlm.data.context_shard import shard_for_context
from megatron_vlm.families.build import DTYPES, context_sharding, wrap_data_parallel
from megatron_vlm.layers.moe import MoE
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.planning.memory import rank_memory
from megatron_vlm.planning.preflight import check_layout
from megatron_vlm.planning.recorder import Counts
from megatron_vlm.planning.stages import trace_stages
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.test_memory import (
    SEQUENCE,
    TENSOR,
    family_of,
    make_batch,
    model_config_of,
    real_chunks,
    run_config,
)

SMALLEST_COUNTED_BYTES = 64  # single numbers and shapes of messages are no part of a plan
# Our names of groups, by megatron-core's.
GROUP_NAMES = {
    "dp_cp": "data",
    "expt_dp": "expert data",
    "tp": "tensor",
    "cp": "context",
    "ep": "expert",
    "expt_tp": "expert-tensor",
    "tp_ep": "experts",
    "pp": "pipeline",
    "embd": "pipeline",
}
PIPELINE, EXPERT = "parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"
MUON, EXPERT_TENSOR = "optimizer.name=muon", "parallel.expert_tensor_parallel_size=2"
CONTEXT = "parallel.context_parallel_size=2"
REPLICATED = "parallel.use_distributed_optimizer=false"
VIRTUAL = [
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.pipeline_layout=[1,0,1,1]",
]


class SentBytes(TorchDispatchMode):
    """Counts what this rank gives to torch.distributed, by kind and by the ranks of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args]
            (group,) = (
                torch.distributed.ProcessGroup.unbox(arg)
                for arg in args
                if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup"
            )
            name = func._schema.name.removeprefix("c10d::").strip("_")
            if name == "alltoall_base" and args[4]:
                self._add_parts([args[index].nbytes for index in range(2)], args[3:5], group)
            else:
                self._add(name, max(sizes), group)
        return func(*args, **(kwargs or {}))

    def _add_parts(self, sizes: list[int], splits: Any, group: torch.distributed.ProcessGroup) -> None:
        """Add what an all-to-all brings to other ranks, or from them if that is more."""
        crossing = [
            size - size * parts[group.rank()] // max(1, sum(parts)) for size, parts in zip(sizes, splits, strict=True)
        ]
        if group.size() > 1 and max(sizes) >= SMALLEST_COUNTED_BYTES:
            self.sent["alltoall", tuple(torch.distributed.get_process_group_ranks(group))] += max(crossing)

    def _add(self, name: str, size: int, group: torch.distributed.ProcessGroup) -> None:
        """Add what a ring sends for a tensor of this size; of pairs, what is sent, not what is received."""
        ranks, kind = tuple(torch.distributed.get_process_group_ranks(group)), name.split("_base")[0]
        if len(ranks) == 1 or size < SMALLEST_COUNTED_BYTES or kind.startswith("recv"):
            return
        if kind == "send":
            self.sent[kind, ranks] += size
        else:
            kind = kind.removesuffix("_coalesced").replace("_into_tensor", "").replace("scatter_tensor", "scatter")
            self.sent[kind, ranks] += size * (len(ranks) - 1) // len(ranks) * (2 if kind == "allreduce" else 1)


def choose_evenly(top_k: int, router: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """Give each token the experts that follow those of the token before, as a plan assumes."""
    weights, chosen, routing = output
    tokens, experts = chosen.shape
    even = torch.zeros(tokens, experts, dtype=torch.bool)
    even.scatter_(1, torch.arange(tokens * top_k).view(tokens, top_k) % experts, True)
    return torch.where(even, 1.0 / top_k, torch.zeros_like(weights)), even, routing


def real_step(name: str, overrides: list[str], world_size: int) -> dict[str, Any]:
    """One step of one rank: what it sent, and what it holds afterwards."""
    config, model_config = run_config(*overrides), model_config_of(name)
    layout, dtype = check_layout(config, model_config, world_size), DTYPES[config.train.precision]
    groups = build_groups(layout)
    chunks = real_chunks(name, config, layout, groups)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoE):
                top_k = module.top_k
                module.gate.register_forward_hook(lambda *args, top_k=top_k: choose_evenly(top_k, *args))
    is_sharded = config.parallel.use_distributed_optimizer
    model = wrap_data_parallel(chunks, groups, is_sharded)
    optimizer = build_optimizer(model, config.optimizer, dtype, is_sharded, groups)
    num_micro_batches = config.train.num_micro_batches(layout.data_size)
    members = {
        name_of_group: tuple(torch.distributed.get_process_group_ranks(group))
        for key, name_of_group in GROUP_NAMES.items()
        if (group := getattr(groups, key)) is not None
    }
    micro_batches = [make_batch(model_config) for _ in range(num_micro_batches)]
    sharding = context_sharding(layout, model_config, groups.cp.rank())
    if sharding is not None:
        micro_batches = [shard_for_context(batch, sharding) for batch in micro_batches]
    with SentBytes() as counted:
        run_global_batch(model, micro_batches, groups)
        apply_gradients(optimizer, gradient_norm(optimizer), 1.0)
    sent: Counter[tuple[int, ...]] = Counter()
    for (kind, ranks), size in counted.sent.items():
        # Of two stages, megatron-core lets the second send in the group of all ranks.
        sent[members["pipeline"] if kind == "send" else ranks] += size
    return {"sent": sent, "members": members, "context_rank": groups.cp.rank(), **held_bytes(model, optimizer)}


def held_bytes(model: Any, optimizer: Any) -> dict[str, int]:
    """Memory of parameters, gradients and optimizer state."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    storages = {parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes() for parameter in parameters}
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state: dict[int, int] = {}
    for member in optimizer.chained_optimizers:
        kept = [tensor for values in member.optimizer.state.values() for tensor in values.values()]
        kept += [parameter for group in member.optimizer.param_groups for parameter in group["params"]]
        for tensor in kept:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in storages:
                state[id(tensor)] = tensor.nbytes if tensor.numel() > 1 else 0
    return {
        "parameters": sum(storages.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(state.values()),
    }


def planned(name: str, overrides: list[str], world_size: int) -> list[dict[str, Any]]:
    """The same of every pipeline stage, from its plan."""
    platform.initialize()
    config, model_config = run_config(*overrides), model_config_of(name)
    layout = check_layout(config, model_config, world_size)
    num_micro_batches = config.train.num_micro_batches(layout.data_size)
    found = []
    for rank, stage in enumerate(
        trace_stages(config, family_of(name), model_config, layout, images_per_row=1, clips_per_row=1)
    ):
        sent: Counter[str] = Counter()
        for chunk in stage.chunks:
            passed = chunk.received_bytes + chunk.returned_bytes
            for group, size in (*by_group(chunk.total).items(), ("pipeline", passed)):
                sent[group] += size * num_micro_batches
        for group, size in by_group(stage.step.exchanges).items():
            sent[group] += size
        memory = rank_memory(config, layout, rank, stage)
        found.append(
            {
                "sent": +sent,
                "parameters": memory.parameter_bytes,
                "gradients": memory.gradient_bytes,
                "optimizer": memory.optimizer_bytes,
            }
        )
    return found


def by_group(counts: Counts) -> Counter[str]:
    sent: Counter[str] = Counter()
    for collective, times in counts.collectives.items():
        if collective.payload_bytes >= SMALLEST_COUNTED_BYTES:
            sent[collective.group] += collective.sent_bytes * times
    return sent


@pytest.mark.parametrize(
    ("name", "world_size", "overrides"),
    [
        ("qwen3_vl", 4, [TENSOR, SEQUENCE, "train.global_batch_size=4"]),
        ("qwen3_vl_moe", 2, [EXPERT, "train.global_batch_size=2"]),
        ("gemma4", 4, [TENSOR, SEQUENCE, PIPELINE, *VIRTUAL, "train.global_batch_size=2"]),
        ("gemma3", 4, [CONTEXT, PIPELINE, "train.global_batch_size=2"]),
        full("qwen3_vl_moe", 4, [CONTEXT, TENSOR, SEQUENCE, EXPERT, "train.global_batch_size=2"]),
        full("gemma3", 4, [PIPELINE, "train.global_batch_size=4"]),
        full("gemma3", 4, [PIPELINE, "parallel.vision_pipeline_layout=[1,2]", "train.global_batch_size=4"]),
        full("mistral3", 2, [REPLICATED, "train.precision=fp32", "train.global_batch_size=2"]),
        full("gemma4 26B-A4B", 4, [TENSOR, SEQUENCE, EXPERT, "train.global_batch_size=2"]),
        full("qwen3_vl", 2, ["model.freeze=[vision_tower]", "train.global_batch_size=2"]),
        ("qwen3_vl_moe", 4, [MUON, EXPERT, "train.global_batch_size=4"]),
        full(
            "qwen3_vl_moe", 4, [MUON, TENSOR, SEQUENCE, EXPERT, EXPERT_TENSOR, REPLICATED, "train.global_batch_size=2"]
        ),
    ],
    ids=[
        "TP2+SP DP2",
        "EP2",
        "TP2+SP PP2 VPP2",
        "CP2 PP2",
        "EP2 CP2 TP2+SP",
        "PP2 DP2",
        "PP2 DP2, tower on both",
        "DP2 replicated",
        "EP2 TP2+SP",
        "frozen",
        "Muon, EP2 DP2",
        "Muon, TP2+SP EP2 ETP2 replicated",
    ],
)
def test_a_real_step(name: str, world_size: int, overrides: list[str]) -> None:
    stages = planned(name, overrides, world_size)
    ranks = run_ranks(world_size, real_step, name, overrides, world_size)
    for rank, found in enumerate(ranks):
        expected = stages[rank * len(stages) // world_size]
        sent: Counter[tuple[int, ...]] = Counter()  # two of our names may be one group
        for group, size in expected["sent"].items():
            sent[found["members"][group]] += size
        # The first context rank is planned; it encodes the image.
        assert found["sent"] == sent or found["context_rank"] > 0, f"rank {rank}"
        assert {key: found[key] for key in ("parameters", "gradients")} == {
            key: expected[key] for key in ("parameters", "gradients")
        }
    # A plan has the optimizer state of the data rank with the largest shard.
    for stage, expected in enumerate(stages):
        size = world_size // len(stages)
        assert max(found["optimizer"] for found in ranks[stage * size : (stage + 1) * size]) == expected["optimizer"]
