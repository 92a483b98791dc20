"""Micro-batches on all pipeline stages of a data-parallel rank: stages with towers read them and hand them on.

A later stage needs ids, labels, spans and grids but no pixels, and only decoding a row tells whether it is bad or too
long. So a stage without towers opens no data file, image, video or clip, and has no data workers: the first stage with
towers sends it the micro-batches of a step without the towers' inputs, in one message, before the step. At that moment
the device has finished the step before, so that a message over its network keeps nothing else waiting.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.loader import BatchLoader, BatchSharding, MicroBatchLoader
from megatron_vlm.errors import UserError

LONGEST_PAUSE_SECONDS = 5.0
Loaders = tuple[MicroBatchLoader, MicroBatchLoader | None]
"""Of training and of held-out data."""


class Stages:
    """The pipeline stages of a data-parallel rank, and which of them send to which.

    Args:
        group: the ranks of the pipeline.
        reading: pipeline ranks that read rows; the first of them sends to those that do not.
        device: where the group communicates.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, reading: Sequence[int], device: torch.device) -> None:
        self.group, self.device = group, device
        self.reads = group.rank() in reading
        self._sender = min(reading)
        self.is_sender = group.rank() == self._sender
        self._key = f"loaders built/{torch.distributed.get_global_rank(group, self._sender)}"

    def await_sender(self) -> None:
        """Return once the sender has called this, too: it may take longer than a collective is allowed to."""
        store = torch.distributed.distributed_c10d._get_default_store()
        if self.is_sender:
            store.set(self._key, "")
        began = time.monotonic()
        while not store.check([self._key]):
            time.sleep(min(LONGEST_PAUSE_SECONDS, 0.01 + (time.monotonic() - began) / 20))

    def share(self, message: bytes) -> bytes:
        """Return the sender's message; those of other ranks are not looked at. Called on every rank of the pipeline."""
        size = torch.tensor(len(message), device=self.device)
        torch.distributed.broadcast(size, group=self.group, group_src=self._sender)
        content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.is_sender:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        torch.distributed.broadcast(content, group=self.group, group_src=self._sender)
        if self.is_sender:
            return message
        received = torch.empty(content.shape, dtype=content.dtype)
        return received.copy_(content).numpy().tobytes()


class StageLoader(BatchLoader):
    """Loader of one pipeline stage of several.

    Args:
        facts: of the loader of the stage that sends.
        sharding: this data rank's part of every global batch.
        stages: the pipeline.
        reader: this stage's own loader, if it reads rows.
        pin_memory: put received tensors into page-locked memory.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        sharding: BatchSharding,
        stages: Stages,
        reader: MicroBatchLoader | None,
        pin_memory: bool,
    ) -> None:
        super().__init__(sharding=sharding, **facts)
        self.stages, self.reader, self.pin_memory = stages, reader, pin_memory

    def global_batch(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next global batch.

        Raises:
            DataError, ConfigError: see `MicroBatchLoader`; on every stage.
        """
        began, batches, error = time.perf_counter(), None, None
        if self.reader is not None:
            try:
                batches = self.reader.global_batch()
            except UserError as problem:
                error = problem
        message = self.stages.share(pickle.dumps(error) if batches is None else encode(batches))
        if error is not None:
            raise error
        if not self.stages.is_sender:
            received = decode(message)  # raises what the sender raises
            batches = batches or [batch.pin_memory() if self.pin_memory else batch for batch in received]
        assert batches is not None
        self.consumed_samples += self.sharding.global_batch_size
        self.wait_seconds += time.perf_counter() - began
        return batches

    def seek(self, consumed_samples: int) -> None:
        self.consumed_samples = consumed_samples
        if self.reader is not None:
            self.reader.seek(consumed_samples)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


def build_on_stages(
    build: Callable[[], Loaders], sharding: BatchSharding, stages: Stages, pin_memory: bool
) -> tuple[BatchLoader, BatchLoader | None]:
    """Build the loaders of a stage of a pipeline; called on each of its ranks.

    Args:
        build: builds those of a stage that reads rows.
        sharding: this data rank's part of every global batch.
        stages: the pipeline.
        pin_memory: see `StageLoader`.

    Raises:
        UserError: what `build` raised, on every stage.
    """
    readers: tuple[MicroBatchLoader | None, MicroBatchLoader | None] = None, None
    message = b""
    if stages.reads:
        try:
            readers = build()
            message = pickle.dumps([None if reader is None else reader.facts() for reader in readers])
        except UserError as error:
            message = pickle.dumps(error)
    stages.await_sender()
    train, valid = (
        None if facts is None else StageLoader(facts, sharding, stages, reader, pin_memory)
        for facts, reader in zip(_loaded(stages.share(message)), readers, strict=True)
    )
    assert train is not None
    return train, valid


_SENT = tuple(field.name for field in fields(MicroBatch) if field.init and field.name != "media_inputs")


def encode(batches: Sequence[MicroBatch]) -> bytes:
    """Pack micro-batches without the inputs of towers."""
    plain = [{name: _to_array(getattr(batch, name)) for name in _SENT} for batch in batches]
    # Later protocols give arrays that cannot be written to, about which torch warns.
    return pickle.dumps(plain, protocol=4)


def decode(message: bytes) -> list[MicroBatch]:
    """Unpack what `encode` packed.

    Raises:
        UserError: the sender met one instead.
    """
    return [
        MicroBatch(media_inputs={}, **{name: _to_tensor(value) for name, value in batch.items()})
        for batch in _loaded(message)
    ]


def _to_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if hasattr(value, "__array__") else value


def _loaded(message: bytes) -> Any:
    content = pickle.loads(message)
    if isinstance(content, UserError):
        raise content
    return content
