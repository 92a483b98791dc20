"""megatron-core's `torch_dist` checkpoint format, written and read a few rows at a time by a single process.

A `torch_dist` checkpoint is torch.distributed.checkpoint's: `.distcp` files that are runs of torch.save records, a
`.metadata` file that says which part of which tensor each record holds, and megatron-core's `metadata.json` and
`common_state` record. megatron-core and torch write it from tensors that are all in memory at once. Here torch.save and
torch.load only lay out and describe the records (`skip_data`, the meta device), and the bytes go by in small blocks.
What is written is loaded by `megatron.core.dist_checkpointing.load` in any layout.

Checksums: a record is a zip file, which holds the CRC-32 of its values. torch writes it and never looks at it again;
whoever reads here does, of what it reads anyway (`TorchDistReader` rows, `CheckedFileReader` whole records).

Trust: `.metadata` is a pickle. The reader here admits only the classes that describe a checkpoint, and opens records
with `weights_only`; training looks through it before megatron-core's own loader, which has no such limit, reads on. A
checkpoint that somebody else made may still be as dangerous as a program that somebody else made.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from isal import isal_zlib
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, LoadPlan, LoadPlanner
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
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import skip_data

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import StreamedFile, read_bytes, write_durably
from megatron_vlm.files.safetensors_headers import row_blocks
from megatron_vlm.files.small_files import read_small
from megatron_vlm.progress import Progress

MEGATRON_METADATA_FILE = "metadata.json"
COMMON_STATE_KEY = "common_state/shard_0_1"  # megatron-core's unique key of its only ShardedObject
RECORD_BYTES = 64 * 2**20  # a rank that wants a few rows has to read whole records
CHECK_BYTES = 8 * 2**20
MAX_METADATA_BYTES = 2**30
# Of zip files: a member's header ends with the lengths of its name and of an extra field; its values are followed by a
# descriptor whose second word is their CRC-32; its entry in the directory at the end has the CRC-32 at byte 16, and at
# byte 28 the lengths of name, extra field and comment.
ZIP_HEADER_BYTES = 30
ZIP_DESCRIPTOR = b"PK\x07\x08"
ZIP_ENTRY_BYTES = 46
ZIP_ENTRY_CRC_BYTE = 16
ZIP_ENTRY_LENGTHS_BYTE = 28
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
            values = block.contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.seek(unwritten.position_byte)
            unwritten.position_byte += self._file.write(values)
            unwritten.crc = isal_zlib.crc32(values, unwritten.crc)
            unwritten.record_rows -= len(block)
            unwritten.rows -= len(block)
            rows = rows[len(block) :]
            if not unwritten.record_rows:
                for crc_byte in unwritten.crc_bytes:
                    self._file.seek(crc_byte)
                    self._file.write(struct.pack("<L", unwritten.crc))

    def _begin_record(self, key: str, entry: TensorStorageMetadata, unwritten: _Unwritten) -> None:
        """Append a record for the next rows of a tensor, without their values."""
        first_row, end_row = next(unwritten.records)
        offsets = torch.Size([first_row, *[0] * (len(entry.size) - 1)] if entry.size else [])
        sizes = torch.Size([end_row - first_row, *entry.size[1:]] if entry.size else [])
        with skip_data():  # the memory of this tensor is never touched, so it costs none
            storage = self._append(MetadataIndex(key, offsets), torch.empty(sizes, dtype=entry.properties.dtype))
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        record = _Record(self._file, storage)
        unwritten.record_rows = end_row - first_row
        unwritten.position_byte = storage.offset + _locate_data(record).begin_byte
        unwritten.crc_bytes = tuple(storage.offset + crc_byte for crc_byte in _locate_crcs(record))
        unwritten.crc = 0

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
        crc: CRC-32 of the record's rows so far.
        crc_bytes: where it belongs in the file.
    """

    records: Iterator[tuple[int, int]]
    rows: int
    record_rows: int = 0
    position_byte: int = 0
    crc: int = 0
    crc_bytes: tuple[int, ...] = ()


class TorchDistReader:
    """Reads rows of the tensors in a `torch_dist` checkpoint, without process groups.

    The values of a record are compared with its checksum when its last row has been read; whoever hands on what is read
    here calls `check_rest` before it is relied on.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: not a distributed checkpoint, or damaged metadata.
    """

    METADATA_FILE = ".metadata"
    METADATA_FILES = (MEGATRON_METADATA_FILE, METADATA_FILE)

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory).absolute()
        fix = "give the directory of one complete checkpoint"
        if not (self.directory / MEGATRON_METADATA_FILE).exists():
            raise CheckpointError("not a distributed checkpoint (no metadata.json)", str(self.directory), fix)
        self._check_format(self.directory / MEGATRON_METADATA_FILE)
        path = self.directory / self.METADATA_FILE
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
        for key, entry in self.tensors.items():
            found, size = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
            if found < size:
                raise CheckpointError(f"{size - found} of the {size} elements of {key} are missing", str(path), DAMAGED)
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
        begin_byte = (first_row - piece.first_row) * math.prod(sizes[1:]) * dtype.itemsize
        self._check_up_to(piece, begin_byte)
        values = piece.read(begin_byte, math.prod(shape) * dtype.itemsize, memory)
        piece.check(begin_byte, values)
        return values.view(dtype).view(shape)

    def _check_up_to(self, piece: _Piece, end_byte: int) -> None:
        """Read what was skipped of a piece's values, for its checksum."""
        memory = BlockMemory()
        while piece.checked_bytes < end_byte:
            begin_byte = piece.checked_bytes
            piece.check(begin_byte, piece.read(begin_byte, min(RECORD_BYTES, end_byte - begin_byte), memory))

    def check_rest(self) -> None:
        """Read the rest of every record that was read in part, and compare it with its checksum.

        Raises:
            CheckpointError: its values are not those that were saved.
        """
        for pieces in self._pieces.values():
            for piece in pieces:
                if piece.checked_bytes:
                    self._check_up_to(piece, piece.num_bytes)

    def check_all(self) -> None:
        """Read all that was not read yet, of tensors and other things, and compare it with its checksum; see above."""
        self.check_rest()
        done = {id(piece.storage) for pieces in self._pieces.values() for piece in pieces if piece.checked_bytes}
        left = {index: storage for index, storage in self._storage.items() if id(storage) not in done}
        with Progress("comparing checksums", sum(storage.length for storage in left.values())) as progress:
            for index, storage in left.items():
                try:
                    _check_record(_Record(self._stream(storage), storage), index.fqn)
                except UNREADABLE as error:
                    raise self._unreadable(index.fqn, error) from error
                progress.advance(storage.length)

    def _locate(self, key: str, chunk: ChunkStorageMetadata) -> _Piece:
        dtype = self.tensors[key].properties.dtype
        try:
            storage = self._storage[MetadataIndex(key, chunk.offsets)]
            stream = self._stream(storage)
            data = _locate_data(_Record(stream, storage))
        except UNREADABLE as error:
            raise self._unreadable(key, error) from error
        if data.shape != chunk.sizes or data.dtype != dtype or not data.is_contiguous:
            raise CheckpointError(f"{key} is stored as {data}", str(self.directory), DAMAGED)
        num_bytes = math.prod(chunk.sizes) * dtype.itemsize
        return _Piece(key, chunk, storage, stream, storage.offset + data.begin_byte, num_bytes, data.crc)

    def _stream(self, storage: _StorageInfo) -> io.FileIO:
        if storage.relative_path not in self._streams:
            self._streams[storage.relative_path] = io.FileIO(self.directory / storage.relative_path, "rb")
        return self._streams[storage.relative_path]

    def _unreadable(self, key: str, error: BaseException) -> CheckpointError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return CheckpointError(f"cannot read {key} ({reason})", str(self.directory), DAMAGED)


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Return True; TypeError where a damaged description has other things than sizes."""
    sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))]
    if not all(type(size) is torch.Size for size in sizes) or not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError("a tensor's description is incomplete")
    return True


class CheckedFileReader(FileSystemReader):
    """torch's reader, which megatron-core loads with, but what it reads must have the checksum that it was saved with.

    A record is read once even if several parts of it are wanted, and nothing is read for the checksum alone.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned into the planner's tensors.

        Raises:
            ValueError: a record's values are not those that were saved.
        """
        wanted = [(self.storage_data[item.storage_index], item) for item in plan.items]
        wanted.sort(key=lambda entry: (entry[0].relative_path, entry[0].offset))
        total_bytes = sum({(storage.relative_path, storage.offset): storage.length for storage, _ in wanted}.values())
        with Progress(f"loading {Path(self.path).name}", total_bytes) as progress:
            for path, in_file in itertools.groupby(wanted, lambda entry: entry[0].relative_path):
                with io.FileIO(os.path.join(self.path, path), "rb") as stream:
                    for _, in_record in itertools.groupby(in_file, lambda entry: entry[0].offset):
                        storages, items = zip(*in_record, strict=True)
                        try:
                            _load_record(_Record(stream, storages[0]), items, planner)
                        except UNREADABLE as error:
                            if path in str(error):
                                raise
                            key, reason = items[0].storage_index.fqn, " ".join(str(error).split())
                            raise ValueError(f"what {path} holds of {key} cannot be read ({reason})") from error
                        progress.advance(storages[0].length)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _load_record(record: _Record, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
    """Read a record and give the planner the parts of it that it wants."""
    key = items[0].storage_index.fqn
    if items[0].type == LoadItemType.BYTE_IO:
        _check_record(record, key)
        record.seek(0)
        content = record.read()
        for item in items:
            planner.load_bytes(item, io.BytesIO(content))
        return
    stored = torch.load(cast(IO[bytes], record), map_location="cpu", weights_only=True)
    values = torch.empty(0, dtype=torch.uint8).set_(stored.untyped_storage())
    _check_crc(isal_zlib.crc32(values.numpy()), _find_values(record)[1].CRC, key, record.file_name)
    for item in items:
        part = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.shape != part.shape:
            raise ValueError(f"{key} is stored as {list(part.shape)} where {list(target.shape)} is wanted")
        target.copy_(part)
        planner.commit_tensor(item, target)


def _check_record(record: _Record, key: str) -> None:
    """Compare every member of a record with its checksum."""
    with zipfile.ZipFile(cast(IO[bytes], record)) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("not what torch.save writes")
        crc, left = 0, member.file_size
        record.seek(_begin_byte(record, member))
        while left and (block := record.read(min(left, CHECK_BYTES))):
            crc = isal_zlib.crc32(block, crc)
            left -= len(block)
        _check_crc(crc, member.CRC, key, record.file_name)


def _check_crc(crc: int, stored_crc: int, key: str, file_name: str) -> None:
    """Raise ValueError where the values are not those that were saved; 0 stands where earlier imports wrote none."""
    if crc != stored_crc != 0:
        raise ValueError(f"what {file_name} holds of {key} is not what was saved: its checksum differs")


@dataclass
class _Piece:
    """A saved part of a tensor: which part, and where its values begin in which file; its first bytes are checked."""

    key: str
    chunk: ChunkStorageMetadata
    storage: _StorageInfo
    stream: io.FileIO
    begin_byte: int
    num_bytes: int
    stored_crc: int
    checked_bytes: int = 0
    crc: int = 0

    def read(self, begin_byte: int, num_bytes: int, memory: BlockMemory | None) -> torch.Tensor:
        """Read a range of its values as uint8; for `memory` see `read_bytes`."""
        try:
            return read_bytes(self.stream.fileno(), self.begin_byte + begin_byte, num_bytes, memory)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot be read ({error})", os.fsdecode(self.stream.name), DAMAGED) from error

    def check(self, begin_byte: int, values: torch.Tensor) -> None:
        """Take values into the checksum that continue what it has, and compare it once it has all."""
        new = values[self.checked_bytes - begin_byte :]
        if not len(new):
            return
        self.crc = isal_zlib.crc32(new.numpy(), self.crc)
        self.checked_bytes += len(new)
        if self.checked_bytes == self.num_bytes:
            try:
                _check_crc(self.crc, self.stored_crc, self.key, self.storage.relative_path)
            except ValueError as error:
                raise CheckpointError(str(error), os.fsdecode(self.stream.name), DAMAGED) from None

    @property
    def first_row(self) -> int:
        return self.chunk.offsets[0] if self.chunk.offsets else 0

    @property
    def end_row(self) -> int:
        return self.first_row + (self.chunk.sizes[0] if self.chunk.sizes else 1)


@dataclass(frozen=True)
class _RecordData:
    """The tensor in a torch.save record; `begin_byte` counts from the record's begin, `crc` is the stored CRC-32."""

    shape: torch.Size
    dtype: torch.dtype
    is_contiguous: bool
    begin_byte: int
    crc: int


def _locate_data(record: _Record) -> _RecordData:
    """Find the values in a torch.save record without reading them: it is a zip file of uncompressed members."""
    record.seek(0)
    tensor = torch.load(cast(IO[bytes], record), map_location="meta", weights_only=True)
    _, values = _find_values(record)
    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.untyped_storage().nbytes() == tensor.nbytes == values.file_size
    ):
        raise ValueError("not one plain tensor")
    begin_byte = _begin_byte(record, values)
    return _RecordData(tensor.shape, tensor.dtype, tensor.is_contiguous(), begin_byte, values.CRC)


def _locate_crcs(record: _Record) -> tuple[int, int]:
    """Find where a torch.save record holds the CRC-32 of its values: behind them, and in the zip file's directory."""
    position, values = _find_values(record)
    descriptor_byte = _begin_byte(record, values) + values.file_size
    record.seek(descriptor_byte)
    assert record.read(4) == ZIP_DESCRIPTOR
    return descriptor_byte + 4, position + ZIP_ENTRY_CRC_BYTE


def _find_values(record: _Record) -> tuple[int, zipfile.ZipInfo]:
    """Return where the directory entry of a torch.save record's values begins, and the entry; check all else."""
    with zipfile.ZipFile(cast(IO[bytes], record)) as archive:
        members, position = archive.infolist(), archive.start_dir
        values = [member for member in members if "/data/" in member.filename]
        for member in members:
            if member not in values:
                archive.read(member)  # raises BadZipFile where the checksum differs
    if len(values) != 1 or values[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("not one plain tensor")
    for _ in range(members.index(values[0])):
        record.seek(position + ZIP_ENTRY_LENGTHS_BYTE)
        position += ZIP_ENTRY_BYTES + sum(struct.unpack("<HHH", record.read(6)))
    return position, values[0]


def _begin_byte(record: _Record, member: zipfile.ZipInfo) -> int:
    record.seek(member.header_offset)
    header = record.read(ZIP_HEADER_BYTES)
    name_bytes, extra_bytes = struct.unpack("<HH", header[-4:])
    return member.header_offset + ZIP_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


class _Record(io.RawIOBase):
    """The part of an open file that holds one record, as a file of its own."""

    def __init__(self, stream: io.FileIO, storage: _StorageInfo) -> None:
        self._stream = stream
        self._begin_byte = storage.offset
        self._num_bytes = storage.length
        self._position = 0
        self.file_name = str(storage.relative_path)

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
        done = 0
        while done < len(view):  # a call reads at most 2 GiB, and torch takes fewer bytes than asked for as damage
            count = os.preadv(self._stream.fileno(), [view[done:]], self._begin_byte + self._position + done)
            if count == 0:
                break
            done += count
        self._position += done
        return done


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
