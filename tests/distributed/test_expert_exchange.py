"""Our exchange of tokens gives what megatron-core's token dispatchers give, forward and backward, bit for bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher

from megatron_vlm.layers import moe
from megatron_vlm.layers.expert_exchange import RowExperts
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.mcore_config import build_mcore_config
from tests.distributed.test_moe import DISPATCHERS, EXPERTS, HIDDEN, LOADS, WIDTH, run_load
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import two_sizes

CLASSES = {
    "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
    "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
}
LAYOUTS = {
    "EP2": TestLayout(2, expert=2),
    "TP2, experts shared": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "TP4, experts shared": TestLayout(4, tensor=4, sequence_parallel=True, expert_tensor=4),
    "EP2xTP2": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
}


class Finished:
    """Stands for a CUDA stream and its events, whose work is always finished."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self) -> Finished:
        return self

    def synchronize(self) -> None:
        pass


class Dispatcher:
    """megatron-core's, in the place of ours."""

    def __init__(self, kind: str, layout: TestLayout, top_k: int, groups: ProcessGroupCollection) -> None:
        config = build_mcore_config(HIDDEN, 4, torch.float32, layout.ranks(num_layers=1))
        settings = {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": top_k,
            "moe_ffn_hidden_size": WIDTH,
            "expert_model_parallel_size": groups.ep.size(),
            "expert_tensor_parallel_size": groups.expt_tp.size(),
        }
        for name, value in settings.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        count = EXPERTS // groups.ep.size()
        first = groups.ep.rank() * count
        self.dispatcher: Any = CLASSES[kind](count, list(range(first, first + count)), config, groups)

    def __call__(
        self, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor, experts: RowExperts
    ) -> torch.Tensor:
        rows, weights = self.dispatcher.dispatch_preprocess(x_TH, chosen_TE, weights_TE)
        rows, weights = self.dispatcher.token_dispatch(rows, weights)
        rows, counts, weights = self.dispatcher.dispatch_postprocess(rows, weights)
        rows = self.dispatcher.combine_preprocess(experts(rows, counts.cumsum(0).int(), weights))
        return self.dispatcher.combine_postprocess(self.dispatcher.token_combine(rows))


def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Split sizes of an all-to-all, which gloo takes as numbers only; megatron-core converts those of a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def run_both(layout: TestLayout) -> None:
    """On a rank: every load through both exchanges."""
    groups = build_groups(layout.ranks())
    initialize_megatron(1, groups)
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = Finished()
    for kind, replaced in zip(DISPATCHERS, ("AllToAll", "AllGather"), strict=True):
        for name, load in LOADS.items():
            ours = run_load(layout, load, kind, torch.float32, groups)
            replacement = mock.Mock(return_value=Dispatcher(kind, layout, load.top_k, groups))
            with (
                mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", on_host),
                mock.patch.object(moe, replaced, replacement),
            ):
                theirs = run_load(layout, load, kind, torch.float32, groups)
            assert replacement.called
            found = {"output": ours.output, "input": ours.input_gradient} | ours.gradients
            wanted = {"output": theirs.output, "input": theirs.input_gradient} | theirs.gradients
            for part, value in found.items():
                # Sums over a token's experts have the same order.
                assert torch.equal(value, wanted[part]), f"{kind}, {name}: {part}"


@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "TP2, experts shared", "EP2xTP2"))
def test_exchanges_give_what_megatron_gives(name: str) -> None:
    run_ranks(LAYOUTS[name].world_size, run_both, LAYOUTS[name])
