"""Checks of all ranks together, before weights are read: one program everywhere, and groups that communicate well."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform as machine
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm import platform
from megatron_vlm.config import Config, to_dict
from megatron_vlm.data.plan import BatchPlan
from megatron_vlm.errors import DataError, LaunchError
from megatron_vlm.parallel.placement import Node, host_of

PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy", "torchvision", "tokenizers")
SAMPLE_BYTES = {True: 64 * 2**20, False: 2**18}
"""What is summed to measure a group, on an accelerator and elsewhere."""
ROUNDS = 3
SLOW_RATIO, SLOW_SECONDS = 2.0, 2e-3
"""A group is slow that takes so many times as long as most of its kind, and so much longer."""
_GROUPS = {
    "tensor": "tp",
    "context": "cp",
    "data": "dp",
    "pipeline": "pp",
    "expert tensor": "expt_tp",
    "expert": "ep",
    "expert data": "expt_dp",
}


def check_same_program(config: Config, hf_config: Mapping[str, Any]) -> None:
    """Make sure that all ranks have the same code, packages, configuration and model configuration.

    Args:
        config: this rank's configuration.
        hf_config: the model's configuration in Hugging Face's form.

    Raises:
        LaunchError: names what differs, and the first rank where it does.
    """
    parts = {
        "code of megatron_vlm": _code_digest(),
        "package versions": _digest({name: _version(name) for name in PACKAGES} | {"python": machine.python_version()}),
        "configuration": _digest(to_dict(config)),
        "model configuration": _digest(hf_config),
    }
    names, lowest = _find_differing(parts)
    if names:
        raise LaunchError(
            f"rank {lowest} differs from rank 0 in its {' and '.join(names)}",
            fix="let all nodes use the same checkout, environment and files",
        )


def check_same_data(plans: Mapping[str, BatchPlan]) -> None:
    """Make sure that all ranks have the same data, by the contents of the files.

    Args:
        plans: the order of rows, by the key of the configuration that names the sources.

    Raises:
        DataError: names the key, and the first rank whose files differ.
    """
    names, lowest = _find_differing({key: int(plan.fingerprint, 16) >> 65 for key, plan in plans.items()})
    if names:
        raise DataError(
            f"the files of {' and '.join(names)} are not the same on rank {lowest} as on rank 0",
            fix="give all nodes the same files, and start again once nobody writes to them",
        )


def _find_differing(parts: Mapping[str, int]) -> tuple[list[str], int]:
    """Return which parts differ on some rank from rank 0, and the lowest rank where one does; called on every rank."""
    device, rank = platform.current().device, torch.distributed.get_rank()
    world_size = torch.distributed.get_world_size()
    mine = torch.tensor(list(parts.values()), dtype=torch.int64, device=device)
    first = mine.clone()
    torch.distributed.broadcast(first, src=0)
    # Of each part the lowest rank that has another one.
    differing = torch.where(mine == first, world_size, rank)
    torch.distributed.all_reduce(differing, op=torch.distributed.ReduceOp.MIN)
    ranks = differing.tolist()
    return [name for name, lowest in zip(parts, ranks, strict=True) if lowest < world_size], min(ranks)


def _digest(content: Any) -> int:
    return _number(json.dumps(content, sort_keys=True, default=str).encode())


def _number(content: bytes) -> int:
    """Return 63 bits of a digest."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def _code_digest() -> int:
    import vlm_kernels

    digest = hashlib.blake2b()
    for package in (Path(__file__).parents[1], Path(vlm_kernels.__file__).parent):
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h"):  # not what each node may have compiled itself
                digest.update(f"{path.relative_to(package)}\n".encode())
                digest.update(path.read_bytes())
    return _number(digest.digest())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_groups(groups: ProcessGroupCollection, nodes: list[Node]) -> list[str]:
    """Sum a sample in every group of several ranks; called on every rank.

    Args:
        groups: this rank's process groups.
        nodes: the nodes of the run, on the first rank.

    Returns:
        On the first rank a line with the bandwidth of each kind of group, and a warning for each kind with a slow one.
    """
    current = platform.current()
    sample = torch.zeros(SAMPLE_BYTES[current.accelerated], dtype=torch.uint8, device=current.device)
    has_experts = groups.tp_ep.size() > groups.tp.size() or groups.ep.size() > 1
    figures, warnings = [], []
    for name, key in _GROUPS.items():
        group = getattr(groups, key)
        if group.size() == 1 or (name.startswith("expert") and not has_experts):
            continue
        seconds = torch.tensor(_seconds_to_sum(sample, group), dtype=torch.float64, device=current.device)
        everywhere = [torch.zeros_like(seconds) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everywhere, seconds)
        times = torch.stack(everywhere).tolist()
        figures.append(f"{name} {_bandwidth(group.size(), sample.numel(), times) / 1e9:.2f}")
        if torch.distributed.get_rank() == 0:
            warnings += _slowness(name, times, nodes)
    if torch.distributed.get_rank() or not figures:
        return []
    return [f"groups    GB/s to sum {sample.numel() / 2**20:g} MiB: {', '.join(figures)}", *warnings]


def _seconds_to_sum(sample: torch.Tensor, group: torch.distributed.ProcessGroup) -> float:
    torch.distributed.all_reduce(sample, group=group)  # the first one connects
    torch.distributed.barrier()
    platform.current().synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        torch.distributed.all_reduce(sample, group=group)
    platform.current().synchronize()
    return (time.perf_counter() - began) / ROUNDS


def _bandwidth(size: int, num_bytes: int, seconds: list[float]) -> float:
    """Return the bytes per second that each rank of most groups sends, as a ring would."""
    return 2 * (size - 1) / size * num_bytes / statistics.median_low(seconds)


def _slowness(name: str, seconds: list[float], nodes: list[Node]) -> list[str]:
    """Return a warning if some rank's group takes much longer than most."""
    usual, longest = statistics.median_low(seconds), max(seconds)
    if longest <= SLOW_RATIO * usual or longest - usual <= SLOW_SECONDS:
        return []
    rank = seconds.index(longest)
    return [
        f"warning: the {name} group of rank {rank} on {host_of(rank, nodes)} takes {longest / usual:.1f} times as long "
        "as others -- see whether its machine or its network is busy or broken"
    ]
