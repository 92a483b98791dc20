"""The counts of tokens that megatron-core's dispatcher brings to the host, where experts get equally many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import unset_fake_temporarily


@contextmanager
def even_choices() -> Iterator[None]:
    """Say what the host will find when it waits for the dispatcher's counts."""
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def with_values(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = preprocess(dispatcher, routing_map)
        choices, experts = routing_map.shape[0] * dispatcher.config.moe_router_topk, dispatcher.num_experts
        assert choices % experts == 0, f"{choices} choices are not equally many for {experts} experts"
        each, of_rank = choices // experts, choices // dispatcher.ep_size
        sources = dispatcher.ep_size * dispatcher.tp_size
        for tensor, value in (
            (dispatcher.input_splits, of_rank),
            (dispatcher.output_splits, of_rank),
            (dispatcher.output_splits_tp, choices),
            (dispatcher.num_global_tokens_per_local_expert, each),
            (tokens_per_expert, each * sources),
        ):
            if isinstance(tensor, torch.Tensor):
                with unset_fake_temporarily():
                    tensor.known_values = torch.full(tuple(tensor.shape), value)  # type: ignore[attr-defined]
        return tokens_per_expert

    with (
        mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", with_values),
        mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),  # made once per process
    ):
        yield
