"""megatron-core's `torch_dist` checkpoint format, written and read a few rows at a time by a single process.

A `torch_dist` checkpoint is torch.distributed.checkpoint's: `.distcp` files that are runs of torch.save records, a
`.metadata` file that says which part of which tensor each record holds, and megatron-core's `metadata.json` and
`common_state` record. megatron-core and torch write it from tensors that are all in memory at once. Here torch.save and
torch.load only lay out and describe the records (`skip_data`, the meta device), and the bytes go by in small blocks.
What is written is loaded by `megatron.core.dist_checkpointing.load` in any layout.

Trust: `.metadata` is a pickle. The reader here admits only the classes that describe a checkpoint, and opens records
with `weights_only`; training looks through it before megatron-core's own loader, which has no such limit, reads on. A
checkpoint that somebody else made may still be as dangerous as a program that somebody else made.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
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
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import skip_data

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import StreamedFile, read_bytes, write_durably
from megatron_vlm.files.safetensors_headers import row_blocks
from megatron_vlm.files.small_files import read_small

MEGATRON_METADATA_FILE = "metadata.json"
COMMON_STATE_KEY = "common_state/shard_0_1"  # megatron-core's unique key of its only ShardedObject
RECORD_BYTES = 64 * 2**20  # a rank that wants a few rows has to read whole records
MAX_METADATA_BYTES = 2**30
ZIP_HEADER_BYTES = 30  # of a member's local header; it ends with the lengths of the name and the extra field
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, LookupError, ValueError, ArithmeticError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
)
DAMAGED = "the checkpoint is damaged: use another one"


class TorchDistWriter:
    """Writes a `torch_dist` checkpoint, the rows of every tensor in their order.

    Args:
        directory: exists and is empty; usually one from `staged_directory`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = StreamedFile(directory / f"__0_0{DEFAULT_SUFFIX}")
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._unwritten: dict[str, _Unwritten] = {}
        self._results: list[WriteResult] = []

    def add(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Begin the tensor `key`; its rows are written next, between those of others if need be."""
        self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        self._unwritten[key] = _Unwritten(row_blocks(shape, dtype, RECORD_BYTES), shape[0] if shape else 1)

    def write(self, key: str, rows: torch.Tensor) -> None:
        """Write the next rows of a tensor (the value, for a scalar) into its records.

        Args:
            key: name of the tensor in the checkpoint.
            rows: in host memory, of the tensor's type.
        """
        entry, unwritten = self._entries[key], self._unwritten[key]
        assert isinstance(entry, TensorStorageMetadata) and rows.dtype == entry.properties.dtype
        rows = torch.atleast_1d(rows)
        while len(rows):
            if not unwritten.record_rows:
                self._begin_record(key, entry, unwritten)
            block = rows[: unwritten.record_rows]
            self._file.seek(unwritten.position_byte)
            unwritten.position_byte += self._file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy())
            unwritten.record_rows -= len(block)
            unwritten.rows -= len(block)
            rows = rows[len(block) :]

    def _begin_record(self, key: str, entry: TensorStorageMetadata, unwritten: _Unwritten) -> None:
        """Append a record for the next rows of a tensor, without their values."""
        first_row, end_row = next(unwritten.records)
        offsets = torch.Size([first_row, *[0] * (len(entry.size) - 1)] if entry.size else [])
        sizes = torch.Size([end_row - first_row, *entry.size[1:]] if entry.size else [])
        with skip_data():  # the memory of this tensor is never touched, so it costs none
            storage = self._append(MetadataIndex(key, offsets), torch.empty(sizes, dtype=entry.properties.dtype))
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        unwritten.record_rows = end_row - first_row
        unwritten.position_byte = storage.offset + _locate_data(self._file, storage).begin_byte

    def close(self, common_state: dict[str, Any]) -> None:
        """Finish the file and write the metadata.

        Args:
            common_state: what megatron-core returns besides the tensors; plain values only.
        """
        missing = {key: unwritten.rows for key, unwritten in self._unwritten.items() if unwritten.rows}
        assert not missing, f"rows not written: {missing}"
        self._append(MetadataIndex(COMMON_STATE_KEY), [common_state])
        self._entries[COMMON_STATE_KEY] = BytesStorageMetadata()
        self._file.finish()
        FileSystemWriter(self.directory).finish(Metadata(state_dict_metadata=self._entries), [self._results])
        write_durably(
            self.directory / MEGATRON_METADATA_FILE,
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
        )

    def abort(self) -> None:
        """Close the file without finishing it."""
        self._file.close()

    def _append(self, index: MetadataIndex, value: Any) -> _StorageInfo:
        """Write one torch.save record at the end of the file, and note where it is."""
        begin_byte = self._file.seek(0, os.SEEK_END)
        torch.save(value, self._file)
        storage = _StorageInfo(self._file.path.name, begin_byte, self._file.tell() - begin_byte)
        self._results.append(WriteResult(index, storage.length, storage))
        return storage


@dataclass
class _Unwritten:
    """What is still to be written of a tensor.

    Attributes:
        records: first and end rows of the records that are not begun.
        rows: number in all.
        record_rows: number in the record that is begun.
        position_byte: where the next row belongs in the file.
    """

    records: Iterator[tuple[int, int]]
    rows: int
    record_rows: int = 0
    position_byte: int = 0


class TorchDistReader:
    """Reads rows of the tensors in a `torch_dist` checkpoint, without process groups.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: not a distributed checkpoint, or damaged metadata.
    """

    METADATA_FILES = (MEGATRON_METADATA_FILE, ".metadata")

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory).absolute()
        fix = "give the directory of one complete checkpoint"
        if not (self.directory / MEGATRON_METADATA_FILE).exists():
            raise CheckpointError("not a distributed checkpoint (no metadata.json)", str(self.directory), fix)
        self._check_format(self.directory / MEGATRON_METADATA_FILE)
        path = self.directory / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(read_small(path, MAX_METADATA_BYTES))).load()
            self._storage: dict[MetadataIndex, _StorageInfo] = dict(metadata.storage_data)
            self.tensors: dict[str, TensorStorageMetadata] = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and _is_whole(entry)
            }
        except (*UNREADABLE, AttributeError, TypeError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot read its metadata ({reason})", str(path), DAMAGED) from error
        self._pieces: dict[str, list[_Piece]] = {}
        self._streams: dict[str, io.FileIO] = {}

    @staticmethod
    def _check_format(path: Path) -> None:
        """Refuse another format than this, and a damaged `metadata.json`, before megatron-core reads it."""
        try:
            content = json.loads(read_small(path))
            backend, version = content["sharded_backend"], content["sharded_backend_version"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise CheckpointError(f"cannot be read ({reason})", str(path), DAMAGED) from error
        if (backend, version) != ("torch_dist", 1):
            what = f"format {backend!r}, version {version!r}, is not that of this program (torch_dist, 1)"
            raise CheckpointError(what, str(path), "use another checkpoint")

    def incompleteness(self) -> str | None:
        """Return which file of those with tensors is missing or too short, or None."""
        try:
            ends: dict[str, int] = {}
            for stored in self._storage.values():
                ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
            for name, end in sorted(ends.items()):
                if not (self.directory / name).exists():
                    return f"{name} is missing"
                if (self.directory / name).stat().st_size < end:
                    return f"{name} is cut short"
        except (AttributeError, TypeError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read its metadata ({error})", str(self.directory), DAMAGED) from error
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._streams:
            self._streams.popitem()[1].close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.size) for name, tensor in self.tensors.items()}

    def read_rows(self, key: str, first_row: int, end_row: int, memory: BlockMemory | None = None) -> torch.Tensor:
        """Rows of a tensor (a scalar's value), whatever pieces it was saved in; for `memory` see `read_bytes`."""
        entry = self.tensors[key]
        if key not in self._pieces:
            self._pieces[key] = [self._locate(key, chunk) for chunk in entry.chunks]
        shape = (end_row - first_row, *entry.size[1:]) if entry.size else ()
        result = None
        for piece in self._pieces[key]:
            first, end = (max(first_row, piece.first_row), min(end_row, piece.end_row)) if shape else (0, 1)
            if first >= end:
                continue
            rows = self._read_piece(piece, first, end, entry.properties.dtype, memory)
            if rows.shape == shape:
                return rows
            if result is None:
                result = torch.empty(shape, dtype=entry.properties.dtype)
            target = result.narrow(0, first - first_row, end - first)
            for dim in range(1, len(shape)):
                target = target.narrow(dim, piece.chunk.offsets[dim], piece.chunk.sizes[dim])
            target.copy_(rows)
        return torch.empty(shape, dtype=entry.properties.dtype) if result is None else result

    def _read_piece(
        self, piece: _Piece, first_row: int, end_row: int, dtype: torch.dtype, memory: BlockMemory | None
    ) -> torch.Tensor:
        sizes = piece.chunk.sizes
        shape = (end_row - first_row, *sizes[1:]) if sizes else ()
        row_bytes = math.prod(sizes[1:]) * dtype.itemsize
        begin_byte = piece.begin_byte + (first_row - piece.first_row) * row_bytes
        try:
            values = read_bytes(piece.stream.fileno(), begin_byte, math.prod(shape) * dtype.itemsize, memory)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot be read ({error})", os.fsdecode(piece.stream.name), DAMAGED) from error
        return values.view(dtype).view(shape)

    def _locate(self, key: str, chunk: ChunkStorageMetadata) -> _Piece:
        dtype = self.tensors[key].properties.dtype
        try:
            storage = self._storage[MetadataIndex(key, chunk.offsets)]
            if storage.relative_path not in self._streams:
                self._streams[storage.relative_path] = io.FileIO(self.directory / storage.relative_path, "rb")
            stream = self._streams[storage.relative_path]
            data = _locate_data(stream, storage)
        except UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"cannot read {key} ({reason})", str(self.directory), DAMAGED) from error
        if data.shape != chunk.sizes or data.dtype != dtype or not data.is_contiguous:
            raise CheckpointError(f"{key} is stored as {data}", str(self.directory), DAMAGED)
        return _Piece(chunk, stream, storage.offset + data.begin_byte)


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Return True; TypeError where a damaged description has other things than sizes."""
    sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))]
    if not all(type(size) is torch.Size for size in sizes) or not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError("a tensor's description is incomplete")
    return True


@dataclass(frozen=True)
class _Piece:
    """A saved part of a tensor: which part, and where its values begin in which file."""

    chunk: ChunkStorageMetadata
    stream: io.FileIO
    begin_byte: int

    @property
    def first_row(self) -> int:
        return self.chunk.offsets[0] if self.chunk.offsets else 0

    @property
    def end_row(self) -> int:
        return self.first_row + (self.chunk.sizes[0] if self.chunk.sizes else 1)


@dataclass(frozen=True)
class _RecordData:
    """The tensor in a torch.save record; `begin_byte` counts from the record's begin."""

    shape: torch.Size
    dtype: torch.dtype
    is_contiguous: bool
    begin_byte: int


def _locate_data(stream: io.FileIO, storage: _StorageInfo) -> _RecordData:
    """Find the values in a torch.save record without reading them: it is a zip file of uncompressed members."""
    record = _Record(stream, storage)
    tensor = torch.load(cast(IO[bytes], record), map_location="meta", weights_only=True)
    with zipfile.ZipFile(cast(IO[bytes], record)) as archive:
        values = [member for member in archive.infolist() if "/data/" in member.filename]
    if not isinstance(tensor, torch.Tensor) or len(values) != 1 or values[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("not one plain tensor")
    record.seek(values[0].header_offset)
    header = record.read(ZIP_HEADER_BYTES)
    name_bytes, extra_bytes = struct.unpack("<HH", header[-4:])
    begin_byte = values[0].header_offset + ZIP_HEADER_BYTES + name_bytes + extra_bytes
    begin_byte += int(tensor.storage_offset()) * tensor.dtype.itemsize
    return _RecordData(tensor.shape, tensor.dtype, tensor.is_contiguous(), begin_byte)


class _Record(io.RawIOBase):
    """The part of an open file that holds one record, as a file of its own."""

    def __init__(self, stream: io.FileIO, storage: _StorageInfo) -> None:
        self._stream = stream
        self._begin_byte = storage.offset
        self._num_bytes = storage.length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._num_bytes - self._position)]
        count = os.preadv(self._stream.fileno(), [view], self._begin_byte + self._position) if view else 0
        self._position += count
        return count


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
