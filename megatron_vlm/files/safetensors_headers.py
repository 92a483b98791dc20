"""The layout of safetensors files: headers, shards and the index, without the data.

Source: the description of the safetensors format, and `huggingface_hub`'s splitting into shards.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 2**20  # what is in memory at a time; larger blocks fall out of the processor's cache on their way
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file name, dtype, shape, and the range of its bytes in the file."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin_byte: int
    end_byte: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end_byte - self.begin_byte


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as stored (length prefix included) and its tensors in the order of bytes."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (first row, end row) of blocks of at most `block_bytes`, or one row; a scalar counts as one row."""
    num_rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, block_bytes // row_bytes) if row_bytes else max(1, num_rows)
    for first_row in range(0, num_rows, step):
        yield first_row, min(first_row + step, num_rows)


def read_shard_header(path: Path) -> Shard:
    """Parse the header of a safetensors file and check it against the file's size.

    Args:
        path: the file.

    Returns:
        Its tensors in the order of their bytes, and the header to write the same file again.

    Raises:
        CheckpointError: missing, truncated or corrupt.

    Source: the safetensors format description; the same checks as its Rust parser, but with the file named.
    """
    fix = "download or save this file again"
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("a weight file is a pipe, a device or a directory", str(path), fix)
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= MAX_HEADER_BYTES:
                raise CheckpointError("not a safetensors file, or cut short", str(path), fix)
            header = stream.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointError("a weight file is missing", str(path), fix) from None
    except OSError as error:
        raise CheckpointError(f"cannot read a weight file: {error.strerror}", str(path), fix) from error
    if len(header) < header_bytes:
        raise CheckpointError(f"the file is truncated inside its header ({size} bytes)", str(path), fix)
    try:
        tensors = _parse_header(json.loads(header, object_pairs_hook=_without_duplicates), path.name, 8 + header_bytes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"corrupt safetensors header ({error})", str(path), fix) from error
    expected_bytes = tensors[-1].end_byte if tensors else 8 + header_bytes
    if size != expected_bytes:
        state = "truncated" if size < expected_bytes else "too long"
        raise CheckpointError(f"the file is {state}: {size} bytes, its header says {expected_bytes}", str(path), fix)
    return Shard(path.name, prefix + header, tensors)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands twice")
    return entries


def _parse_header(header: Mapping[str, Any], file: str, data_start_byte: int) -> tuple[StoredTensor, ...]:
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError("__metadata__ maps other things than text to text")
            continue
        if entry["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        dtype, shape = TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin_byte, end_byte = entry["data_offsets"]
        # Also where another dimension is 0: torch counts in 64 bits.
        sizes_are_valid = all(type(size) is int and size >= 0 for size in (*shape, begin_byte, end_byte))
        sizes_are_valid = sizes_are_valid and math.prod(filter(None, shape)) < 2**60
        if not sizes_are_valid or end_byte - begin_byte != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: shape {list(shape)} and offsets {begin_byte}..{end_byte} do not fit")
        tensors.append(StoredTensor(name, file, dtype, shape, data_start_byte + begin_byte, data_start_byte + end_byte))
    tensors.sort(key=lambda tensor: (tensor.begin_byte, tensor.end_byte))
    position = data_start_byte
    for tensor in tensors:
        if tensor.begin_byte != position:
            raise ValueError(f"the bytes before {tensor.name} are shared or belong to no tensor")
        position = tensor.end_byte
    return tuple(tensors)


@dataclass(frozen=True)
class WeightFiles:
    """What is going to be written: the shards with their headers, and the index (None for a single file)."""

    shards: tuple[Shard, ...]
    index: bytes | None

    def __iter__(self) -> Iterator[StoredTensor]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.num_bytes for tensor in self)

    @classmethod
    def again(cls, shards: tuple[Shard, ...], index: bytes | None) -> WeightFiles:
        """Existing files once more: the same headers byte for byte, and the same index if its total is right."""
        if index is not None:
            content = json.loads(index)
            total_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
            metadata = content.get("metadata")
            if not isinstance(metadata, dict) or metadata.get("total_size") != total_bytes:
                content["metadata"] = {"total_size": total_bytes}
                index = _encode_index(content)
        return cls(shards, index)

    def with_format(self) -> WeightFiles:
        """The same files with `format: pt` in every header, which loaders of earlier years ask for."""
        return WeightFiles(tuple(map(_with_format, self.shards)), self.index)

    @classmethod
    def plan(
        cls,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        writers: Mapping[str, int] | None = None,
    ) -> WeightFiles:
        """Assign tensors to shards in the given order, as `save_pretrained` does.

        Args:
            tensors: name, dtype and shape of each.
            max_shard_bytes: a shard ends before it would exceed this; a larger tensor gets a shard of its own.
            writers: who writes each tensor, by name; a shard has tensors of one writer, in the order of their numbers.
        """
        writers = writers or {}
        tensors = sorted(tensors, key=lambda tensor: writers.get(tensor[0], 0))
        groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        group_bytes = total_bytes = total_parameters = 0
        for name, dtype, shape in tensors:
            num_bytes = math.prod(shape) * dtype.itemsize
            is_other = groups[-1] and writers.get(name, 0) != writers.get(groups[-1][-1][0], 0)
            if is_other or (groups[-1] and group_bytes + num_bytes > max_shard_bytes):
                groups.append([])
                group_bytes = 0
            groups[-1].append((name, dtype, shape))
            group_bytes += num_bytes
            total_bytes += num_bytes
            total_parameters += math.prod(shape)
        if len(groups) == 1:
            return cls((_plan_shard(SINGLE_FILE, groups[0]),), None)
        count = len(groups)
        shards = tuple(
            _plan_shard(f"model-{number:05d}-of-{count:05d}.safetensors", group)
            for number, group in enumerate(groups, start=1)
        )
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        metadata = {"total_parameters": total_parameters, "total_size": total_bytes}
        return cls(shards, _encode_index({"metadata": metadata, "weight_map": weight_map}))


def _with_format(shard: Shard) -> Shard:
    header = json.loads(shard.header[8:])
    metadata = header.get("__metadata__", {})
    if metadata.get("format") == "pt":
        return shard
    return _encode_shard(shard.file, {**header, "__metadata__": metadata | {"format": "pt"}})


def _encode_index(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _plan_shard(file: str, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> Shard:
    """Lay out one file as the safetensors library does: widest dtype first, then by name, header padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset_byte = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0])):
        end_byte = offset_byte + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset_byte, end_byte],
        }
        offset_byte = end_byte
    return _encode_shard(file, header)


def _encode_shard(file: str, header: dict[str, Any]) -> Shard:
    """Encode the header of a file, padded to 8 bytes."""
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return Shard(file, struct.pack("<Q", len(encoded)) + encoded, _parse_header(header, file, 8 + len(encoded)))
