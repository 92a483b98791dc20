"""Ranks that meet in a store, and one that does not come."""

from __future__ import annotations

import multiprocessing
import os
import socket
from datetime import timedelta
from typing import Any

import pytest

from megatron_vlm.errors import LaunchError
from megatron_vlm.training import arrival


def meet_as(rank: int, world_size: int, port: int, seconds: float, queue: Any) -> None:
    """A process of one rank."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        store, *mine = arrival.meet(timedelta(seconds=seconds))
    except LaunchError as error:
        queue.put((rank, str(error)))
        return
    store.set(f"done {rank}", "")
    store.wait([f"done {each}" for each in range(world_size)])
    queue.put((rank, mine))
    if rank == 0:
        store.wait([f"left {each}" for each in range(1, world_size)])
    store.set(f"left {rank}", "")


def outcome_of(ranks: range, world_size: int, seconds: float) -> dict[int, Any]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=meet_as, args=(rank, world_size, port, seconds, queue)) for rank in ranks]
    for process in processes:
        process.start()
    outcome = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    return outcome


def test_all_ranks_meet() -> None:
    assert outcome_of(range(3), 3, 60.0) == {rank: [rank, 3] for rank in range(3)}


def test_missing_ranks_are_named() -> None:
    """By the first rank; the others have lost it then."""
    outcome = outcome_of(range(2), 5, 2.0)
    assert outcome[0].startswith("ranks 2-4 of 5 did not start within")
    assert outcome[1].startswith("rank 1 on ") and "cannot reach the first rank at 127.0.0.1" in outcome[1]


def test_the_first_rank_says_whom_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrival, "SAY_AFTER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LaunchError, match="rank 1 of 2 did not start"):
        arrival.meet(timedelta(seconds=1))
    assert capsys.readouterr().out.startswith("waiting for rank 1 of 2 for 0 s\n")


def test_short_names() -> None:
    assert arrival._names([3, 8, 9, 10, 15]) == "ranks 3, 8-10, 15"
    assert arrival._names(list(range(0, 40, 2))) == "ranks 0, 2, 4, 6, 8, 10, 12, 14, ..."


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_PORT"])
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv(missing)
    with pytest.raises(LaunchError, match=f"RANK is set, .*{missing}.* unset RANK for a single process"):
        arrival.meet(timedelta(seconds=1))
