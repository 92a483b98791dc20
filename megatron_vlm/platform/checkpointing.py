"""What megatron-core's distributed checkpointing needs from us: repairs, error reports, and random states.

Three parts of megatron-core 0.19.2 are replaced here; tests/checkpoint/test_distributed_save.py has a test of each.

- `filesystem_async._results_queue`: the default starts a manager process by `spawn` (4 to 10 seconds, and the user's
  script runs again in it). `_WriteResults` needs no process. Goes when megatron-core no longer spawns.
- the function that writes a rank's file: the default reports any failure as "<class 'OSError'>". Ours keeps the text.
- the function that finishes a save: the default lets rank 0 raise between two collectives (disk full while writing the
  metadata), which leaves every other rank waiting. Ours lets every rank learn of the failure. It also gathers where the
  parts were written, as objects from all ranks, only if that differs from the save before.

The last two go when megatron-core reports failures with their text on every rank.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
import torch.distributed
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlm.platform.agreement import gather_if_any, is_any, share_first
from megatron_vlm.platform.device import current
from megatron_vlm.platform.host_memory import HostMemory


class SaveFailed(Exception):
    """Some rank could not write its part of a checkpoint; the message is the first failure's text, on every rank."""


class _WriteResults:
    """Carries one result from a forked writer to its parent through anonymous memory; no process, no size limit."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint_write_results"), "w+b")

    def put(self, result: object) -> None:
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(result, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        if not self._file.read(1):
            return RuntimeError("the process that writes its part ended early (killed?)")
        self._file.seek(0)
        result = pickle.load(self._file)
        self._file.seek(0)
        self._file.truncate()
        return result


def _write_files(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: _WriteResults) -> None:
    """Write this rank's files in a process of its own; put the write results by bucket, or the exception."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole job: the run, which waits for this, acts on it
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        _, outcome = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, None, None, use_fsync=True, use_msc=use_msc
        )
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[index] = outcome
    results.put(written)


def _stage(memory: HostMemory, buckets: list[Any]) -> list[Any]:
    """Copy the tensors that this rank writes into host memory; the result is what `_write_files` takes."""
    copies = iter(memory.copy([tensor for *_, (_, items) in buckets for _, tensor in items]))
    return [
        (path, name, (objects, [(item, next(copies)) for item, _ in items])) for path, name, (objects, items) in buckets
    ]


class SaveStrategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Writes megatron-core's `torch_dist` format and publishes it on rank 0 once every rank's files are on disk.

    Args:
        host_memory: what is saved is copied into it first. None leaves it where it is, which must be on the host: the
            forked process that writes has it as it was.
    """

    def __init__(self, host_memory: HostMemory | None) -> None:
        super().__init__(cached_metadata=True)
        self._host_memory = host_memory
        self.publish: Callable[[], None] = lambda: None
        """Called on rank 0 after the checkpoint's own metadata was written; what it raises reaches every rank."""
        self._metadata: Any = None
        self._written: Any = None
        """What this rank wrote in the last save, and where; on rank 0 also `_all_written`, by rank."""
        self._all_written: list[Any] = []
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = _WriteResults()
        # The notice recommends a package that exists for CUDA only.
        torch_strategy._logged_mcore_async_deprecation = True

    def async_save(self, *arguments: Any, **options: Any) -> AsyncRequest:
        """Prepare a save as megatron-core does, but planned once: the caller takes care that the plans still hold."""
        request = super().async_save(*arguments, **options)
        self.validated_cache_reuse = True
        return request

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: tuple[Any, ...], async_strategy: str
    ) -> AsyncRequest:
        _, metadata, _ = save_state_dict_ret
        if metadata is not None:  # on rank 0, when the save was planned
            del metadata.all_local_plans
            self._metadata = metadata
        write, _, arguments = writer.get_save_function_and_args()
        stage = None
        if write is not None:
            transforms, use_msc = write.args
            write = partial(_write_files, transforms, use_msc)
            stage = None if self._host_memory is None else partial(_stage, self._host_memory, writer.write_buckets)
        return AsyncRequest(write, arguments, [partial(self._finish, writer)], preload_fn=stage)

    def _finish(self, writer: Any) -> None:
        """Collect what every rank wrote, write the metadata, publish; every rank learns of a failure.

        Files usually get the same names and parts as in the save before, so that there is nothing to collect.
        """
        written = writer.retrieve_write_results()
        failed = not isinstance(written, list)  # torch's wrapped exception: (exception, stack)
        failures = gather_if_any(str(written[0]) if failed else None)
        found = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None]
        if found:
            raise SaveFailed(found[0])
        is_first = torch.distributed.get_rank() == 0
        if is_any(written != self._written):
            everything: list[Any] | None = [None] * torch.distributed.get_world_size() if is_first else None
            torch.distributed.gather_object(written, everything)
            self._written, self._all_written = written, everything or []
        failure = None
        if is_first:
            try:
                writer.finish(self._metadata, self._all_written)
                save_config(CheckpointingConfig(self.backend, self.version), writer.checkpoint_dir)
                self.publish()
            except Exception as error:  # whatever it is, the other ranks are waiting for the broadcast
                failure = str(error) or repr(error)
        failure = share_first(failure)
        if failure is not None:
            raise SaveFailed(failure)


@contextmanager
def loading_with(reader: type[FileSystemReader]) -> Iterator[None]:
    """Within the block, megatron-core's `load` and its strategies read by this class, for which it has no parameter."""
    modules: tuple[Any, ...] = (torch_strategy, serialization)
    originals = [module._get_filesystem_reader for module in modules]
    for module in modules:
        module._get_filesystem_reader = lambda directory, **_: reader(directory)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module._get_filesystem_reader = original


def random_state() -> dict[str, Any]:
    """Return the state of every random stream of this process, as tensors: they take equally many bytes in each save.

    Returns:
        `python`, `numpy`, `torch` and the named streams of megatron-core's tracker; `device` where there is one.
    """
    _, keys, *rest = numpy.random.get_state()
    version, words, gauss = random.getstate()
    state = {
        "python": {
            "words": torch.tensor([version, *words]),
            "gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        },
        "numpy": {
            "keys": torch.from_numpy(keys.astype(numpy.int64)),
            "rest": torch.tensor(rest, dtype=torch.float64),  # position, has_gauss, cached_gaussian
        },
        "torch": torch.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    if current().accelerated:
        state["device"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore every random stream to a state taken by `random_state`, or by that of an earlier version."""
    of_python, of_numpy = state["python"], state["numpy"]
    if isinstance(of_python, dict):
        (version, *words), gauss = of_python["words"].tolist(), float(of_python["gauss"])
        of_python = (version, tuple(words), None if math.isnan(gauss) else gauss)
        position, has_gauss, cached = of_numpy["rest"].tolist()
        of_numpy = ("MT19937", of_numpy["keys"], int(position), int(has_gauss), cached)
    random.setstate(of_python)
    name, keys, *rest = of_numpy
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "device" in state and current().accelerated:
        torch.cuda.set_rng_state(state["device"])
