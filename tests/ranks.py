"""Runs test functions on several ranks, in worker processes that are started once per test session.

They are forked after the heavy imports, so four of them are ready in 0.2 s (torchrun needs 15 s), and from a process
that never computes: a backward pass starts threads of autograd, which no process forked after it could use.
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
    def __init__(self, template: multiprocessing.connection.Connection) -> None:
        self.template = template
        with multiprocessing.connection.Listener(family="AF_UNIX", backlog=NUM_WORKERS) as listener:
            template.send(listener.address)
            pipes = [listener.accept() for _ in range(NUM_WORKERS)]
        by_rank = {pipe.recv(): pipe for pipe in pipes}
        self.pipes = [by_rank[rank] for rank in range(NUM_WORKERS)]

    def run(self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((world_size, str(Path(folder) / "rendezvous"), function, arguments))
            for pipe in self.pipes[:world_size]:
                pipe.send_bytes(job)
            results: dict[int, Any] = {}
            while len(results) < world_size:
                # Whichever rank answers: the others of a failed one may be waiting for it.
                waiting = [rank for rank in range(world_size) if rank not in results]
                for rank in self._answered(waiting, Path(folder)):
                    results[rank] = self._result(rank, waiting)
            return [results[rank] for rank in range(world_size)]

    def _answered(self, ranks: list[int], folder: Path) -> list[int]:
        ready = multiprocessing.connection.wait([self.pipes[rank] for rank in ranks], TIMEOUT_SECONDS)
        if not ready:
            stacks = "\n".join(path.read_text() for path in sorted(folder.glob("*.stack")))
            raise RankFailure(f"ranks {ranks} did not answer in {TIMEOUT_SECONDS} s\n{stacks}")
        return [rank for rank in ranks if self.pipes[rank] in ready]

    def _result(self, rank: int, waiting: list[int]) -> Any:
        try:
            failed, value = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            raise RankFailure(f"rank {rank} died") from None
        if failed:
            dead = "".join(f"rank {other} died\n" for other in waiting if other != rank and self._died(other))
            raise RankFailure(f"{dead}rank {rank}:\n{value}")
        return value

    def _died(self, rank: int) -> bool:
        """Whether `rank` is dead, which others may notice, by a lost connection, a moment before this process does."""
        try:
            return self.pipes[rank].poll(1) and not self.pipes[rank].recv_bytes()
        except EOFError:
            return True

    def close(self) -> None:
        self.template.send(None)
        self.template.recv()


def _serve_workers(pipe: multiprocessing.connection.Connection, parents: multiprocessing.connection.Connection) -> None:
    """Fork new workers for each listener's address that comes; kill those before them, which is all for a None."""
    parents.close()  # so that the death of the parent, however it dies, ends this process too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it forks workers
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    while True:
        try:
            address = pipe.recv()
        except EOFError:
            return
        for process in processes:
            process.kill()
            process.join()
        processes = []
        if address is None:
            pipe.send(None)  # they are gone
            continue
        for rank in range(NUM_WORKERS):
            processes.append(context.Process(target=_work, args=(rank, address), daemon=True))
            processes[-1].start()


def _work(rank: int, address: str) -> None:
    pipe = multiprocessing.connection.Client(address)  # ends with the parent, which has its other end
    pipe.send(rank)
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


_template: multiprocessing.connection.Connection | None = None
_pool: _Pool | None = None


def prepare() -> None:
    """Fork the process that workers come from, unless it is there: best when all is imported and nothing has run."""
    global _template
    if _template is not None:
        return
    platform.initialize()
    context = multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()  # workers would otherwise walk all that was imported in each collection
    _template, theirs = context.Pipe()
    context.Process(target=_serve_workers, args=(theirs, _template), daemon=True).start()
    gc.unfreeze()
    theirs.close()


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
        prepare()
        assert _template is not None
        _pool = _Pool(_template)
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
