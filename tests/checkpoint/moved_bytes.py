"""Counts what a save copies, sends between ranks, and writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.checkpoint.torch_dist import TorchDistReader


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Within the block, (name, type, bytes) of every tensor that a collective is given."""
    calls: list[tuple[str, torch.dtype, int]] = []
    names = (
        "all_gather",
        "gather",
        "all_gather_into_tensor",
        "broadcast",
        "all_reduce",
        "all_to_all_single",
        "scatter",
    )
    names += ("reduce_scatter_tensor", "send", "recv", "isend", "irecv")

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            values = [*arguments, *options.values()]
            flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
            calls.extend((name, part.dtype, part.nbytes) for part in flat if isinstance(part, torch.Tensor))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            replacement = counting(name, getattr(distributed_c10d, name))
            for module in (torch.distributed, distributed_c10d):
                patch.setattr(module, name, replacement)
        yield calls


class Copies(TorchDispatchMode):
    """Counts the bytes that operators write, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype.is_floating_point and not function.is_view:
            self.num_bytes[str(function)] += result.nbytes
        return result


def bytes_on_disk(checkpoint: Path, num_ranks: int, prefix: str = "") -> list[int]:
    """Bytes of the tensors in the file that each rank wrote."""
    found = [0] * num_ranks
    with TorchDistReader(checkpoint) as reader:
        for index, stored in reader._storage.items():
            entry = reader.tensors.get(index.fqn)
            if entry is not None and index.fqn.startswith(prefix):
                (chunk,) = (chunk for chunk in entry.chunks if chunk.offsets == index.offset)
                rank = int(stored.relative_path.split("_")[2])
                found[rank] += math.prod(chunk.sizes) * entry.properties.dtype.itemsize
    return found
