"""Counts collectives that carry pickled objects, by the number of ranks that take part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import utils

NAMES = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")


@contextmanager
def counted() -> Iterator[Counter[tuple[str, int]]]:
    """Within the block, count the calls of this rank by name and number of ranks, whoever makes them."""
    calls = Counter[tuple[str, int]]()
    kept = {name: getattr(distributed_c10d, name) for name in NAMES}

    def wrapped(name: str) -> Any:
        @functools.wraps(kept[name])
        def call(*arguments: Any, **options: Any) -> Any:
            groups = [value for value in arguments if isinstance(value, torch.distributed.ProcessGroup)]
            group = options.get("group") or next(iter(groups), None)
            calls[name, torch.distributed.get_world_size(group)] += 1
            return kept[name](*arguments, **options)

        return call

    # torch's checkpoint planning calls them through its own reference to the package.
    modules: tuple[Any, ...] = (torch.distributed, distributed_c10d, utils.dist)
    for name in NAMES:
        replacement = wrapped(name)
        for module in modules:
            setattr(module, name, replacement)
    try:
        yield calls
    finally:
        for name, function in kept.items():
            for module in modules:
                setattr(module, name, function)
