"""Gradients of the keys and values that context ranks exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.data.context_shard import ContextSharding, shard_for_context
from megatron_vlm.layers.context_exchange import exchange_keys
from tests.data.test_context_shard import long_rows
from tests.ranks import run_ranks


class Writes(TorchDispatchMode):
    """Counts the operators that write a tensor of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.count += not function.is_view and "empty" not in str(function)
        return result


def halves(load: np.ndarray, num_ranks: int) -> np.ndarray:
    return np.arange(len(load)).reshape(num_ranks, -1)


def writes_of_received_size() -> int:
    """In the backward pass of a rank."""
    rank, heads, head_dim = torch.distributed.get_rank(), 2, 3
    batch = shard_for_context(long_rows(), ContextSharding(rank, 2, ((None, "causal"),), 128, halves))
    assert batch.context is not None
    length, rows = batch.input_ids.shape[1], batch.input_ids.shape[0]
    exchange, group = batch.context.exchanges[None], torch.distributed.group.WORLD
    assert group is not None
    k, v = (torch.randn(length, rows, heads, head_dim, requires_grad=True) for _ in range(2))
    keys, values = exchange_keys(k, v, exchange, group)
    with Writes((exchange.num_keys, rows, 2 * heads, head_dim)) as writes:
        torch.autograd.backward((keys, values), (torch.ones_like(keys), torch.ones_like(values)))
    return writes.count


def test_gradients_of_received_keys_are_written_twice() -> None:
    """Those of keys and of values beside each other, and in the order in which they are sent back: no zeros, no sums.

    They are the largest tensors of a backward pass through attention.
    """
    of_second_rank = run_ranks(2, writes_of_received_size)[1]  # which receives more than it has, and than it sends
    assert of_second_rank == 2
