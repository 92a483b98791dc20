"""Tell a user's error once, although every rank of a job may have it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from megatron_vlm.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SECONDS_FOR_THE_FIRST_RANK = 10.0  # to report; ranks of a busy machine start apart from each other
ERROR_FILE_VARIABLE = "MEGATRON_VLM_ERROR_FILE"
"""Names a file that errors are also appended to: what started the ranks sees only exit codes, torchrun's own."""


def report(error: UserError) -> None:
    """Print the error once for all ranks that have it: by the first rank, or by one of the others if it has not.

    There may be no process group yet, or ranks that wait in it for this one; so ranks meet in the store of torchrun's
    agent, or without an agent in one of the first rank. Where that cannot be reached, every rank prints that is not
    ended before.
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
    has_others = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if error.is_reported_here is None and has_others:
        found_none = _is_mine_to_print(text, rank)
        if found_none and not is_mine:
            _print(text, rank)


def _print(text: str, rank: int) -> None:
    line = f"[rank {rank}] {text}" if rank else text
    print(line, file=sys.stderr, flush=True)
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path:
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _is_mine_to_print(text: str, rank: int) -> bool:
    """Tell other ranks that the first rank has printed a text, or, on another rank, find out whether anybody has."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    key = f"megatron_vlm error {hashlib.sha256(text.encode(errors='replace')).hexdigest()}"
    try:
        store = _store(has_agent, rank)
        if rank == 0:
            store.set(key, "printed")
            if not has_agent:
                _wait_until_seen(store, key)
            return True
        end = time.monotonic() + SECONDS_FOR_THE_FIRST_RANK
        while time.monotonic() < end:
            if store.check([key]):
                store.add(f"{key}, seen", 1)
                return False
            time.sleep(0.1)
        return store.compare_set(f"{key}, other ranks", "", str(rank)) == str(rank).encode()
    except (OSError, RuntimeError):
        # An agent that has ended took the job with it, for a reason that another rank has printed.
        return not has_agent


def _store(has_agent: bool, rank: int) -> TCPStore:
    """Connect to the store of torchrun's agent, or to the first rank's, which is made if it has none yet."""
    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and not has_agent:
        with contextlib.suppress(RuntimeError):  # the port is that of its process group
            return TCPStore(*address, is_master=True, wait_for_workers=False)
    end = time.monotonic() + SECONDS_FOR_THE_FIRST_RANK
    while True:
        try:
            socket.create_connection(address, SECONDS_FOR_THE_FIRST_RANK).close()  # torch would fail with many lines
            return TCPStore(*address, is_master=False, wait_for_workers=False)
        except OSError:
            if has_agent or time.monotonic() > end:
                raise
            time.sleep(0.1)


def _wait_until_seen(store: TCPStore, key: str) -> None:
    """Keep the first rank's store until all other ranks have looked, or had the time for it."""
    end = time.monotonic() + SECONDS_FOR_THE_FIRST_RANK
    while time.monotonic() < end and store.add(f"{key}, seen", 0) < int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(0.1)
