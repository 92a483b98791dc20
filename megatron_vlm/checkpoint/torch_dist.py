"""megatron-core's `torch_dist` checkpoint format, written and read in pieces by a single process.

A `torch_dist` checkpoint is torch.distributed.checkpoint's: `.distcp` files that are runs of torch.save records, a
`.metadata` file that says which part of which tensor each record holds, and megatron-core's `metadata.json` and
`common_state` record. megatron-core and torch write it from tensors that are all in memory at once; the classes here
hold one block of rows at a time. What they write is loaded by `megatron.core.dist_checkpointing.load` in any layout.

Trust: `.metadata` is a pickle. The reader here admits only the classes that describe a checkpoint, and reads tensor
records with `weights_only`. megatron-core's own loader, which training uses, unpickles `.metadata` without such a
limit: a distributed checkpoint that somebody else made is as dangerous as a program that somebody else made.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vlm.checkpoint.staging import write_durably
from megatron_vlm.errors import CheckpointError

MEGATRON_METADATA_FILE = "metadata.json"
COMMON_STATE_KEY = "common_state/shard_0_1"  # megatron-core's unique key of its only ShardedObject
MAX_FILE_BYTES = 4 * 2**30


class TorchDistWriter:
    """Writes a `torch_dist` checkpoint record by record.

    Args:
        directory: exists and is empty; usually one from `staged_directory`.
        max_file_bytes: a new `.distcp` file is begun when the current one has reached this size.
    """

    def __init__(self, directory: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.directory = directory
        self.max_file_bytes = max_file_bytes
        self._stream: FileIO | None = None
        self._file = ""
        self._file_count = 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []

    def write(self, key: str, shape: tuple[int, ...], first_row: int, rows: torch.Tensor) -> None:
        """Write a block of rows of the tensor `key`.

        Args:
            key: name of the tensor in the checkpoint.
            shape: shape of the whole tensor.
            first_row: position of the block along dimension 0.
            rows: the block, in host memory; its dtype is the tensor's.
        """
        entry = self._entries.get(key)
        if entry is None:
            properties = TensorProperties(dtype=rows.dtype)
            entry = self._entries[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
        assert isinstance(entry, TensorStorageMetadata) and entry.properties.dtype == rows.dtype
        assert rows.untyped_storage().nbytes() == rows.nbytes, "torch.save would write the whole storage of a view"
        offsets = torch.Size([first_row, *[0] * (len(shape) - 1)] if shape else [])
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=rows.size()))
        stream = self._next_stream()
        begin_byte = stream.tell()
        torch.save(rows, stream)
        self._record(MetadataIndex(key, offsets, len(entry.chunks) - 1), begin_byte)

    def close(self, common_state: dict[str, Any]) -> None:
        """Finish the files and write the metadata.

        Args:
            common_state: what megatron-core returns besides the tensors; plain values only.
        """
        record = io.BytesIO()
        torch.save([common_state], record)
        stream = self._next_stream()
        begin_byte = stream.tell()
        stream.write(record.getbuffer())
        self._entries[COMMON_STATE_KEY] = BytesStorageMetadata()
        self._record(MetadataIndex(COMMON_STATE_KEY), begin_byte)
        self._finish_file()
        metadata = Metadata(state_dict_metadata=dict(self._entries))
        FileSystemWriter(self.directory).finish(metadata, [self._results])
        write_durably(
            self.directory / MEGATRON_METADATA_FILE,
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
        )

    def abort(self) -> None:
        """Close the open file without finishing it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _record(self, index: MetadataIndex, begin_byte: int) -> None:
        assert self._stream is not None
        num_bytes = self._stream.tell() - begin_byte
        storage = _StorageInfo(self._file, begin_byte, num_bytes)
        self._results.append(WriteResult(index=index, size_in_bytes=num_bytes, storage_data=storage))

    def _next_stream(self) -> FileIO:
        if self._stream is not None and self._stream.tell() >= self.max_file_bytes:
            self._finish_file()
        if self._stream is None:
            self._file = f"__0_{self._file_count}{DEFAULT_SUFFIX}"
            self._file_count += 1
            self._stream = open(self.directory / self._file, "xb", buffering=0)  # noqa: SIM115 (closed by _finish_file)
        return self._stream

    def _finish_file(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.abort()


class TorchDistReader:
    """Reads tensors of a `torch_dist` checkpoint without process groups, a few saved pieces at a time.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: not a distributed checkpoint, or damaged metadata.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory).expanduser().absolute()
        fix = "give the directory of one complete checkpoint"
        if not (self.directory / MEGATRON_METADATA_FILE).is_file():
            raise CheckpointError("not a distributed checkpoint (no metadata.json)", str(self.directory), fix)
        self._reader = _GuardedReader(self.directory)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise CheckpointError(f"cannot read its metadata ({error})", str(self.directory), fix) from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def iter_rows(self, key: str, end_row: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows), cut where no saved piece crosses, so that each piece is read once.

        A checkpoint from an import comes in small blocks; a tensor that training had split along another dimension
        than its rows comes whole.

        Args:
            key: name of the tensor.
            end_row: leave out the rows from here on (vocabulary padding).
        """
        entry = self.tensors[key]
        if not entry.size:
            yield 0, self._read(key, entry.chunks, (), 0)
            return
        end_row = entry.size[0] if end_row is None else end_row
        for first_row, stop_row, chunks in _row_groups(entry.chunks):
            if first_row < end_row:
                rows = self._read(key, chunks, (stop_row - first_row, *entry.size[1:]), first_row)
                yield first_row, rows[: end_row - first_row]

    def _read(
        self, key: str, chunks: list[ChunkStorageMetadata], shape: tuple[int, ...], first_row: int
    ) -> torch.Tensor:
        """Assemble the saved pieces of a block of rows."""
        result = torch.empty(shape, dtype=self.tensors[key].properties.dtype)
        items = []
        for chunk in chunks:
            offsets = torch.Size([chunk.offsets[0] - first_row, *chunk.offsets[1:]] if shape else [])
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=offsets,
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=torch.Size([0] * len(chunk.sizes)),
                    lengths=chunk.sizes,
                )
            )
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(result)).wait()
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"cannot read {key} ({reason})", str(self.directory), "the checkpoint is damaged: use another one"
            ) from error
        return result


def _row_groups(chunks: list[ChunkStorageMetadata]) -> Iterator[tuple[int, int, list[ChunkStorageMetadata]]]:
    """Group saved pieces into consecutive ranges of rows that no piece crosses."""
    group: list[ChunkStorageMetadata] = []
    first_row = stop_row = 0
    for chunk in sorted(chunks, key=lambda chunk: tuple(chunk.offsets)):
        if group and chunk.offsets[0] >= stop_row:
            yield first_row, stop_row, group
            group = []
        if not group:
            first_row = chunk.offsets[0]
        group.append(chunk)
        stop_row = max(stop_row, chunk.offsets[0] + chunk.sizes[0])
    yield first_row, stop_row, group


class _IntoTensor(LoadPlanner):
    """A load plan's other end: every piece goes to its place in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        result = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            result = result.narrow(dim, start, length)
        return result

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError


class _GuardedReader(FileSystemReader):
    """torch's reader, with an unpickler that builds nothing but descriptions of a checkpoint."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("not the metadata of a checkpoint")
        return metadata


_DESCRIPTIONS = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    _StorageInfo,
)


class _MetadataUnpickler(pickle.Unpickler):
    ADMITTED = frozenset(
        {(kind.__module__, kind.__name__) for kind in _DESCRIPTIONS}
        | {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
        | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "Path")}
        | {(TensorProperties.__module__, "_MEM_FORMAT_ENCODING")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours contains")
        return super().find_class(module, name)
