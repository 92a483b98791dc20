"""The sizes of an exchange of tokens that the host waits for, where experts get equally many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_vlm.layers import expert_exchange


@contextmanager
def even_choices() -> Iterator[None]:
    """Say what the host will find when it waits for where the rows of each expert end."""
    call, on_host = expert_exchange.AllToAll.__call__, expert_exchange._Sizes.on_host

    def with_choices(exchange: Any, x_TH: torch.Tensor, *args: Any) -> torch.Tensor:
        exchange.choices = x_TH.shape[0] * exchange.top_k
        return call(exchange, x_TH, *args)

    def with_values(sizes: Any) -> Any:
        with unset_fake_temporarily():
            num_ranks, num_experts = sizes.ends.shape
            choices = sizes._exchange.choices
            assert choices % num_experts == 0, f"{choices} choices are not equally many for {num_experts} experts"
            ends = torch.arange(1, num_experts + 1, dtype=torch.int32) * (choices // num_experts)
            sizes._copy._copy = ends.expand(num_ranks, -1)
        return on_host(sizes)

    with (
        mock.patch.object(expert_exchange.AllToAll, "__call__", with_choices),
        mock.patch.object(expert_exchange._Sizes, "on_host", with_values),
    ):
        yield
