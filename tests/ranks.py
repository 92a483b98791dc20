"""Runs test functions on several ranks, in worker processes that are started once per test session.

Workers are forked after the heavy imports, so four of them are ready in 0.2 s (torchrun needs 15 s).
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vlm import platform

NUM_WORKERS = 4
TIMEOUT_SECONDS = 180


class RankFailure(AssertionError):
    """A rank raised or died; the message holds its traceback."""


class _Pool:
    def __init__(self) -> None:
        platform.initialize()
        torch.set_num_threads(1)
        context = multiprocessing.get_context("fork")
        gc.collect()
        gc.freeze()  # workers would otherwise walk all that was imported in each collection
        self.pipes, self.processes = [], []
        for rank in range(NUM_WORKERS):
            mine, theirs = context.Pipe()
            self.pipes.append(mine)
            process = context.Process(target=_work, args=(rank, theirs, self.pipes), daemon=True)
            process.start()
            theirs.close()  # so that the death of the worker ends what is read here
            self.processes.append(process)
        gc.unfreeze()

    def run(self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((world_size, str(Path(folder) / "rendezvous"), function, arguments))
            for pipe in self.pipes[:world_size]:
                pipe.send_bytes(job)
            results: dict[int, Any] = {}
            while len(results) < world_size:
                # Whichever rank answers: the others of a failed one may be waiting for it.
                for rank in self._answered([rank for rank in range(world_size) if rank not in results], Path(folder)):
                    results[rank] = self._result(rank)
            return [results[rank] for rank in range(world_size)]

    def _answered(self, ranks: list[int], folder: Path) -> list[int]:
        ready = multiprocessing.connection.wait([self.pipes[rank] for rank in ranks], TIMEOUT_SECONDS)
        if not ready:
            stacks = "\n".join(path.read_text() for path in sorted(folder.glob("*.stack")))
            raise RankFailure(f"ranks {ranks} did not answer in {TIMEOUT_SECONDS} s\n{stacks}")
        return [rank for rank in ranks if self.pipes[rank] in ready]

    def _result(self, rank: int) -> Any:
        pipe = self.pipes[rank]
        try:
            failed, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            raise RankFailure(f"rank {rank} died") from None
        if failed:
            raise RankFailure(f"rank {rank}:\n{value}")
        return value

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _work(
    rank: int, pipe: multiprocessing.connection.Connection, parents: list[multiprocessing.connection.Connection]
) -> None:
    for end in parents:
        end.close()  # so that the death of the parent, however it dies, ends this process too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # checkpoints fork writers
    # What a test in the parent may have started belongs to the parent: its data workers' server, its saves' results.
    forkserver._forkserver.__init__()  # type: ignore[misc]
    filesystem_async._results_queue = None
    while True:
        try:
            world_size, rendezvous, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        with Path(f"{rendezvous}.{rank}.stack").open("w") as stack:
            # Where this rank is just before the caller gives up.
            faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 1, file=stack)
            answer = _answer(rank, world_size, rendezvous, function, arguments)
            faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))


def _answer(
    rank: int, world_size: int, rendezvous: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[bool, Any]:
    """(whether it failed, result or traceback) of one function as one of `world_size` ranks."""
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        result = function(*arguments)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        return True, traceback.format_exc()
    gc.collect()  # a model's cycles hold its process groups, whose threads would go on polling
    return False, result


_pool: _Pool | None = None


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` on `world_size` gloo ranks and return the results in rank order.

    Args:
        world_size: 1 to 4.
        function: at module level; the default process group is initialised around it.
        arguments: picklable.

    Raises:
        RankFailure: a rank raised or died; the pool is then started again for the next call.
    """
    global _pool
    assert 1 <= world_size <= NUM_WORKERS
    if _pool is None:
        _pool = _Pool()
        atexit.register(_close)
    try:
        return _pool.run(world_size, function, arguments)
    except BaseException:
        _close()
        raise


def _close() -> None:
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None
