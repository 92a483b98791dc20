"""Micro-batches on all pipeline stages of a data-parallel rank: the first stage reads them and hands them on.

A later stage needs ids, labels, spans and grids but no pixels, and only decoding a row tells whether it is bad or too
long. So a later stage opens no data file, image, video or clip, and has no data workers: the first one sends it the
micro-batches of a step in one message, before the step, without pixels, and with the features of clips only where
another stage has their tower. At that moment the device has finished the step before, so that a message over its
network keeps nothing else waiting.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_facts import ContextShard
from megatron_vlm.data.loader import BatchLoader, BatchSharding, MicroBatchLoader
from megatron_vlm.data.plan import Position
from megatron_vlm.errors import UserError

LONGEST_PAUSE_SECONDS = 5.0
Loaders = tuple[MicroBatchLoader, MicroBatchLoader | None]
"""Of training and of held-out data."""


class Stages:
    """The pipeline stages of a data-parallel rank, and what the first of them sends to the others.

    Args:
        group: the ranks of the pipeline.
        tower_inputs: names of the towers' inputs that each pipeline rank takes (`MicroBatch.media_inputs`).
        device: where the group communicates.
    """

    def __init__(
        self, group: torch.distributed.ProcessGroup, tower_inputs: Sequence[Collection[str]], device: torch.device
    ) -> None:
        self.group, self.device = group, device
        self.is_first = group.rank() == 0
        self.sent_inputs = {name for names in tower_inputs[1:] for name in names}
        self.own_inputs = tower_inputs[group.rank()]
        self._key = f"loaders built/{torch.distributed.get_global_rank(group, 0)}"

    def await_first(self) -> None:
        """Return once the first stage has called this, too: it may take longer than a collective is allowed to."""
        store = torch.distributed.distributed_c10d._get_default_store()
        if self.is_first:
            store.set(self._key, "")
        began = time.monotonic()
        while not store.check([self._key]):
            time.sleep(min(LONGEST_PAUSE_SECONDS, 0.01 + (time.monotonic() - began) / 20))

    def share(self, message: bytes) -> bytes:
        """Return the first stage's message; called on every rank of the pipeline, whose own messages are ignored."""
        size = torch.tensor(len(message), device=self.device)
        torch.distributed.broadcast(size, group=self.group, group_src=0)
        content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.is_first:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        torch.distributed.broadcast(content, group=self.group, group_src=0)
        if self.is_first:
            return message
        received = torch.empty(content.shape, dtype=content.dtype)
        return received.copy_(content).numpy().tobytes()


class StageLoader(BatchLoader):
    """Loader of one pipeline stage of several.

    Args:
        facts: of the first stage's loader.
        sharding: this data rank's part of every global batch.
        stages: the pipeline.
        reader: the loader itself, on the first stage.
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
        began = time.perf_counter()
        if self.reader is None:
            batches = decode(self.stages.share(b""), self.stages.own_inputs)
            if self.pin_memory:
                batches = [batch.pin_memory() for batch in batches]
        else:
            batches = self._read_and_send(self.reader)
        self._advance()
        self.wait_seconds += time.perf_counter() - began
        return batches

    def _read_and_send(self, reader: MicroBatchLoader) -> list[MicroBatch]:
        try:
            batches = reader.global_batch()
        except UserError as error:
            self.stages.share(pickle.dumps(error))
            raise
        self.stages.share(encode(batches, self.stages.sent_inputs))
        return batches

    def seek(self, position: Position) -> None:
        self.position = position
        if self.reader is not None:
            self.reader.seek(position)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


def build_on_stages(
    build: Callable[[], Loaders], sharding: BatchSharding, stages: Stages, pin_memory: bool
) -> tuple[BatchLoader, BatchLoader | None]:
    """Build the loaders of a stage of a pipeline; called on each of its ranks.

    Args:
        build: builds those of the first stage.
        sharding: this data rank's part of every global batch.
        stages: the pipeline.
        pin_memory: see `StageLoader`.

    Raises:
        UserError: what `build` raised, on every stage.
    """
    readers: tuple[MicroBatchLoader | None, MicroBatchLoader | None] = None, None
    message = b""
    if stages.is_first:
        try:
            readers = build()
            message = pickle.dumps([None if reader is None else reader.facts() for reader in readers])
        except UserError as error:
            message = pickle.dumps(error)
    stages.await_first()
    train, valid = (
        None if facts is None else StageLoader(facts, sharding, stages, reader, pin_memory)
        for facts, reader in zip(_loaded(stages.share(message)), readers, strict=True)
    )
    assert train is not None
    return train, valid


_SENT = tuple(field.name for field in fields(MicroBatch) if field.init and field.name != "media_inputs")


def encode(batches: Sequence[MicroBatch], tower_inputs: Collection[str] = ()) -> bytes:
    """Pack micro-batches, of the towers' inputs only those named."""
    plain = [
        ({name: _to_array(getattr(batch, name)) for name in _SENT}, _named(batch.media_inputs, tower_inputs, _to_array))
        for batch in batches
    ]
    # Later protocols give arrays that cannot be written to, about which torch warns.
    return pickle.dumps(plain, protocol=4)


def decode(message: bytes, tower_inputs: Collection[str] = ()) -> list[MicroBatch]:
    """Unpack what `encode` packed, of the towers' inputs only those named.

    Raises:
        UserError: the first stage met one instead.
    """
    return [
        MicroBatch(
            media_inputs=_named(media_inputs, tower_inputs, _to_tensor),
            **{name: _to_tensor(value) for name, value in batch.items()},
        )
        for batch, media_inputs in _loaded(message)
    ]


def _named(inputs: dict[str, Any], names: Collection[str], convert: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: convert(value) for name, value in inputs.items() if name in names}


def _to_array(value: Any) -> Any:
    if isinstance(value, ContextShard):
        return value.map(_to_array)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_tensor(value: Any) -> Any:
    if isinstance(value, ContextShard):
        return value.map(_to_tensor)
    return torch.from_numpy(value) if hasattr(value, "__array__") else value


def _loaded(message: bytes) -> Any:
    content = pickle.loads(message)
    if isinstance(content, UserError):
        raise content
    return content
