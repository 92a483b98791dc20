"""The pool of worker processes that tests of several ranks use."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.ranks import RankFailure, run_ranks


def gradient() -> float:
    x = torch.ones((), requires_grad=True)
    x.square().backward()
    assert x.grad is not None
    return x.grad.item()


def test_new_ranks_compute_gradients_after_this_process_has() -> None:
    assert gradient() == 2
    with pytest.raises(RankFailure, match="rank 1 died"):
        run_ranks(2, die_as_second)
    assert run_ranks(2, gradient) == [2, 2]


def test_a_dead_rank_is_named_though_another_lost_its_connection_first() -> None:
    with pytest.raises(RankFailure, match=r"(?s)^rank 1 died\nrank 0:.*lost"):
        run_ranks(2, die_late_as_second)


def die_late_as_second() -> None:
    if torch.distributed.get_rank() == 0:
        raise ConnectionError("lost")
    time.sleep(0.3)
    os._exit(1)


def die_as_second() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(1)
