"""Tell a user's error once, although every rank of a job may have it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time

from megatron_vlm.errors import UserError

SECONDS_FOR_THE_FIRST_RANK = 10.0  # to report; ranks of a busy machine start apart from each other


def report(error: UserError) -> None:
    """Print the error once for all ranks that have it: by the first rank, or by one of the others if it has not.

    There may be no process group yet, or ranks that wait in it for this one; so ranks meet in the store of torchrun's
    agent. Without one every other rank waits before it prints: whatever started the ranks ends them meanwhile.
    """
    if error.is_reported_here is False:
        return
    rank = int(os.environ.get("RANK", "0"))
    text = f"{type(error).__name__}: {error}"
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_mine = rank == 0 or bool(error.is_reported_here)
    if is_mine:
        _print(text, rank)
    if error.is_reported_here is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found_none = _is_mine_to_print(text, rank)
        if found_none and not is_mine:
            _print(text, rank)


def _print(text: str, rank: int) -> None:
    print(f"[rank {rank}] {text}" if rank else text, file=sys.stderr, flush=True)


def _is_mine_to_print(text: str, rank: int) -> bool:
    """Tell other ranks that the first rank has printed a text, or, on another rank, find out whether anybody has."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(SECONDS_FOR_THE_FIRST_RANK if rank else 0)
        return True
    from torch.distributed import TCPStore

    key = f"megatron_vlm error {hashlib.sha256(text.encode(errors='replace')).hexdigest()}"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, SECONDS_FOR_THE_FIRST_RANK).close()  # torch would fail with many lines
        store = TCPStore(*address, is_master=False, wait_for_workers=False)
        if rank == 0:
            store.set(key, "printed")
            return True
        end = time.monotonic() + SECONDS_FOR_THE_FIRST_RANK
        while time.monotonic() < end:
            if store.check([key]):
                return False
            time.sleep(0.1)
        return store.compare_set(f"{key}, other ranks", "", str(rank)) == str(rank).encode()
    except (OSError, RuntimeError):
        return False  # the agent has ended, and with it the job, for a reason that another rank has printed
