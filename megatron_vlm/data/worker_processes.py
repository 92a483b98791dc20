"""Worker processes of a rank: forked from a server that has imported what they need and runs no thread.

Forking the training process itself beside communication threads may deadlock, and spawning would import torch once per
worker. Workers see no signals, and end with their rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch

from megatron_vlm.errors import DataError

PRELOADED = ("megatron_vlm.data.loader", "megatron_vlm.data.measure_rows")
# A scheduler sends these to every process of a job; a worker that dies of one would take its rank down before it saved.
SIGNALS_LEFT_TO_RANKS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def start_fork_server() -> BaseContext:
    """Start the process that workers are forked from, unless it runs; its imports go on while the caller does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    # The fork server needs the resource tracker, whose start unblocks signals: each starts in a block of its own.
    with signals_blocked():
        resource_tracker.ensure_running()
    with signals_blocked():
        forkserver.ensure_running()
    return context


def start_worker(*_: object) -> None:
    """Prepare a worker; called in it, before it works."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_rank, daemon=True).start()


def raise_if_killed(workers: Iterable[BaseProcess]) -> None:
    """Say what ended a worker, of which pools and loaders know only that it is gone.

    Raises:
        DataError: one of them was ended by a signal.
    """
    for worker in workers:
        worker.join(1.0)  # its fork server may not have heard of it yet
        code = worker.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            guess = "; probably the machine or its container ran out of memory" if -code == signal.SIGKILL else ""
            raise DataError(
                f"data worker {worker.pid} of rank {os.environ.get('RANK', '0')} on {socket.gethostname()} was "
                f"ended by {name}{guess}",
                fix="lower data.num_workers or the size of images, or give the job more memory; "
                "starting again resumes from the last checkpoint",
            )


def _leave_with_rank() -> None:
    """End this worker when its rank was killed; torch's own watchdog looks at the fork server, which waits for it."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    connection.wait([rank.sentinel])
    os._exit(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start processes inside: they inherit the blocked signals and so never see them; here they arrive afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_LEFT_TO_RANKS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
