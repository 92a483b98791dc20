"""Ranks meet before their process group is made, so that those that do not come are named."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from megatron_vlm.errors import LaunchError

SAY_AFTER_SECONDS, SAY_EVERY_SECONDS = 20.0, 60.0
SHOWN_RANKS = 8
_ALL = "arrival/all"


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Connect to the job's store and wait there for all ranks.

    Args:
        timeout: how long the first rank waits; the others follow it.

    Returns:
        The store, this rank, and the number of ranks, for `torch.distributed.init_process_group`.

    Raises:
        LaunchError: ranks are missing, which the first rank names; or the first rank is; or an environment variable.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise LaunchError(
            f"RANK is set, but what belongs to it is missing or no number ({error})",
            "environment",
            "start ranks by torchrun or srun, which set all of it, or unset RANK for a single process",
        ) from None
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: Store = TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not has_agent,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        # The agent's store outlives a restart by torchrun.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"arrival/{rank}", socket.gethostname())
        if rank == 0:
            _wait_for_all(store, world_size, timeout)
            store.set(_ALL, "")
        else:
            store.wait([_ALL], timeout + timedelta(seconds=SAY_AFTER_SECONDS))
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} on {socket.gethostname()} cannot reach the first rank at {host}:{port} "
            f"({str(error).splitlines()[0]})",
            fix="see whether it started, and whether MASTER_ADDR and MASTER_PORT are right and not blocked",
        ) from None
    return store, rank, world_size


def _wait_for_all(store: Store, world_size: int, timeout: timedelta) -> None:
    """Wait on the first rank, and say now and then who is missing."""
    missing, began, next_line = list(range(world_size)), time.monotonic(), SAY_AFTER_SECONDS
    while missing := [rank for rank in missing if not store.check([f"arrival/{rank}"])]:
        seconds = time.monotonic() - began
        if seconds > timeout.total_seconds():
            raise LaunchError(
                f"{_names(missing)} of {world_size} did not start within {timeout.total_seconds() / 60:g} minutes",
                fix="see the output of their nodes, and whether these reach the first one",
            )
        if seconds > next_line:
            next_line = seconds + SAY_EVERY_SECONDS
            print(f"waiting for {_names(missing)} of {world_size} for {seconds:.0f} s", flush=True)
        time.sleep(0.02 if seconds < 5 else 0.5)


def _names(ranks: list[int]) -> str:
    """Return ranks in short, for example "ranks 3, 8-15"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:SHOWN_RANKS]]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(shown)}{', ...' * (len(spans) > SHOWN_RANKS)}"
