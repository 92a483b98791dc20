"""megatron-core's token dispatchers with our permutation give what they give with their own, forward and backward."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_vlm.layers import expert_permutation
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from tests.distributed.test_moe import DISPATCHERS, LOADS, run_load
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import two_sizes

FUNCTIONS = ("permute", "unpermute", "sort_chunks_by_idxs")
CALLS = {
    "alltoall": {"permute": 1, "unpermute": 1, "sort_chunks_by_idxs": 2},
    "allgather": {"permute": 1, "unpermute": 1},
}
LAYOUTS = {
    "EP2": TestLayout(2, expert=2),
    "TP2, experts shared": TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    "TP4, experts shared": TestLayout(4, tensor=4, sequence_parallel=True, expert_tensor=4),
    "EP2xTP2": TestLayout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_megatron(name: str) -> None:
    """The dispatchers look the function up by this name, and pass what it takes."""
    expert_permutation.install()
    theirs, ours = getattr(moe_utils, name), getattr(expert_permutation, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert getattr(token_dispatcher, name) is ours, "not installed"


def run_both(layout: TestLayout) -> None:
    """On a rank: every load through both dispatchers, with either permutation."""
    expert_permutation.install()
    groups = build_groups(layout.ranks())
    initialize_megatron(1, groups)
    for dispatcher in DISPATCHERS:
        for name, load in LOADS.items():
            calls: Counter[str] = Counter()
            with mock.patch.multiple(token_dispatcher, **{each: counted(each, calls) for each in FUNCTIONS}):
                ours = run_load(layout, load, dispatcher, torch.float32, groups)
            assert calls == CALLS[dispatcher], f"{dispatcher} permutes elsewhere: {calls}"
            with mock.patch.multiple(token_dispatcher, **{each: getattr(moe_utils, each) for each in FUNCTIONS}):
                theirs = run_load(layout, load, dispatcher, torch.float32, groups)
            found = {"output": ours.output, "input": ours.input_gradient} | ours.gradients
            wanted = {"output": theirs.output, "input": theirs.input_gradient} | theirs.gradients
            for part, value in found.items():
                # Sums over a token's experts have the same order.
                assert torch.equal(value, wanted[part]), f"{dispatcher}, {name}: {part}"


def counted(name: str, calls: Counter[str]) -> Callable[..., Any]:
    function = getattr(expert_permutation, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "TP2, experts shared", "EP2xTP2"))
def test_dispatchers_give_what_they_gave(name: str) -> None:
    run_ranks(LAYOUTS[name].world_size, run_both, LAYOUTS[name])
