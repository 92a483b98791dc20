"""Hugging Face checkpoint directories, read and written one tensor at a time.

The reader parses the safetensors headers itself and reads tensor bytes with `pread` into a buffer of their own: a
memory map would count every page it touched as resident for as long as the file is open. The writer knows all names,
dtypes and shapes beforehand: it writes the headers and then puts each block of rows where it belongs.

Only safetensors are read; nothing here unpickles. A file name from an index is a plain name inside the directory. The
file behind that name may be a link, because hub caches link every file to a blob elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.assets import ASSET_PATTERNS
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.durable import StreamedFile, copy_durably, read_bytes, write_durably
from megatron_vlm.files.safetensors_headers import (
    BLOCK_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    WeightFiles,
    read_shard_header,
    row_blocks,
)
from megatron_vlm.files.small_files import read_small, sync_directory

OTHER_WEIGHTS = {
    "*.gguf": "in the format of llama.cpp",
    "consolidated*.safetensors": "in Mistral's own format",
    "adapter_model.safetensors": "those of an adapter only, to be merged into its base model",
}
PROCESSOR_PATTERNS = ("*preprocessor_config.json", "processor_config.json")


class SafetensorsReader:
    """The weights of a Hugging Face directory: names, shapes and dtypes at once, data on request.

    All headers are checked against the files' sizes on construction, so a truncated or missing shard is found before
    any work is done.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        CheckpointError: no safetensors, a missing, truncated or corrupt file, or an index that does not fit them.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory).absolute()
        self._descriptors: dict[str, int] = {}
        if not self.directory.is_dir():
            raise CheckpointError("no such directory", str(self.directory), "give a Hugging Face checkpoint directory")
        if not has_weights(self.directory):
            raise _no_weights(self.directory)
        if os.path.lexists(self.directory / SINGLE_FILE):
            self.files = WeightFiles((read_shard_header(self.directory / SINGLE_FILE),), None)
        else:
            self.files = self._open_index(self.directory / INDEX_FILE)
        self.tensors: dict[str, StoredTensor] = {tensor.name: tensor for tensor in self.files}
        for shard in self.files.shards:
            self._descriptors[shard.file] = os.open(self.directory / shard.file, os.O_RDONLY)

    def _open_index(self, path: Path) -> WeightFiles:
        content, listed = _read_index(path)
        shards = tuple(read_shard_header(self.directory / file) for file in sorted(set(listed.values())))
        actual = {(tensor.name, shard.file) for shard in shards for tensor in shard.tensors}
        missing = sorted(set(listed.items()) - actual)
        unlisted = sorted(actual - set(listed.items()))
        if missing or unlisted:
            name, file = (missing or unlisted)[0]
            relation = f"is not in {file}" if missing else f"is in {file} but not listed for it"
            raise CheckpointError(
                f"index and shards disagree on {len(missing) + len(unlisted)} tensors, for example {name} {relation}",
                str(path),
                "download or save the checkpoint again",
            )
        return WeightFiles.again(shards, content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        stored = self.tensors[name]
        return self._read_range(stored, 0, stored.num_bytes).view(stored.shape)

    def read_part(self, name: str, target: torch.Tensor, shape: Sequence[int], part: Sequence[tuple[int, int]]) -> None:
        """Fill `target` with a part of the tensor; see `read_parts`."""
        self.read_parts(name, shape, [(target, part)])

    def read_parts(
        self,
        name: str,
        shape: Sequence[int],
        parts: Sequence[tuple[torch.Tensor, Sequence[tuple[int, int]]]],
        first_element: int = 0,
    ) -> None:
        """Fill tensors with parts of one in files, block by block; read nothing twice, and little else than the parts.

        Args:
            name: the tensor in files.
            shape: in which it (from `first_element` on) is looked at; any with the same order of elements.
            parts: each target and its part of `shape`, the first index and one past the last for every dimension.
                Values are converted to the target's type.
            first_element: where `shape` begins in the tensor.
        """
        stored = self.tensors[name]
        row_elements = math.prod(shape[1:])
        borders = sorted({border for _, (rows, *_) in parts for border in rows})
        for start, stop in pairwise(borders):  # all of these rows belong to the same parts
            held = [
                (target[start - first : stop - first], inner)
                for target, ((first, end), *inner) in parts
                if first <= start and stop <= end
            ]
            whole_rows = all(
                bounds == (0, size) for _, inner in held for bounds, size in zip(inner, shape[1:], strict=True)
            )
            if not whole_rows and row_elements * stored.dtype.itemsize > BLOCK_BYTES:
                for row in range(start, stop):
                    inner_parts = [(target[row - start], inner) for target, inner in held]
                    self.read_parts(name, shape[1:], inner_parts, first_element + row * row_elements)
            elif held:
                self._read_rows_of_parts(stored, shape, held, first_element + start * row_elements)

    def _read_rows_of_parts(
        self,
        stored: StoredTensor,
        shape: Sequence[int],
        parts: Sequence[tuple[torch.Tensor, Sequence[tuple[int, int]]]],
        first_element: int,
    ) -> None:
        """Fill targets, which all have the same rows, in blocks; `parts` says which of the inner dimensions."""
        row_bytes = math.prod(shape[1:]) * stored.dtype.itemsize
        first_byte = first_element * stored.dtype.itemsize
        for first_row, end_row in row_blocks((len(parts[0][0]), *shape[1:]), stored.dtype):
            values = self._read_range(stored, first_byte + first_row * row_bytes, first_byte + end_row * row_bytes)
            rows = values.view(end_row - first_row, *shape[1:])
            for target, inner in parts:
                target[first_row:end_row].copy_(rows[(slice(None), *(slice(*bounds) for bounds in inner))])

    def read_rows(self, name: str, first_row: int, end_row: int, memory: BlockMemory | None = None) -> torch.Tensor:
        """Consecutive rows (for a scalar its value), read with one request; see `read_bytes` for `memory`."""
        stored = self.tensors[name]
        num_rows = stored.shape[0] if stored.shape else 1
        row_bytes = stored.num_bytes // num_rows if num_rows else 0
        rows = self._read_range(stored, first_row * row_bytes, end_row * row_bytes, memory)
        return rows.view(end_row - first_row, *stored.shape[1:]) if stored.shape else rows.view(())

    def _read_range(
        self, stored: StoredTensor, begin_byte: int, end_byte: int, memory: BlockMemory | None = None
    ) -> torch.Tensor:
        """The values in a range of the tensor's bytes, as a flat tensor."""
        descriptor = self._descriptors[stored.file]
        try:
            values = read_bytes(descriptor, stored.begin_byte + begin_byte, end_byte - begin_byte, memory)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot read {stored.name} ({error})", str(self.directory / stored.file)) from error
        return values.view(stored.dtype)


def _no_weights(directory: Path) -> CheckpointError:
    """Tell what a directory has instead of weights that can be read."""
    what, fix = f"neither {SINGLE_FILE} nor {INDEX_FILE}", "add the weight files, or set model.load_weights to false"
    pickles = sorted(path.name for pattern in ("*.bin*", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        what = f"the weights are pickles ({pickles[0]})"
        fix = "only safetensors are read: save the model with save_pretrained of a current transformers"
    for name, kind in OTHER_WEIGHTS.items():
        found = sorted(path.name for path in directory.glob(name))
        if found:
            what, fix = f"the weights are {kind} ({found[0]})", f"give the model's files with {SINGLE_FILE} or an index"
    return CheckpointError(what, str(directory), fix)


def has_weights(directory: Path) -> bool:
    """Whether a directory holds safetensors (a link to a file that is gone counts, and fails when it is read)."""
    return any(os.path.lexists(directory / file) for file in (SINGLE_FILE, INDEX_FILE))


def stored_names(directory: Path) -> frozenset[str] | None:
    """Names of a directory's tensors, None without weights; shards that an index lists are not looked at.

    Raises:
        CheckpointError: the index or the only weight file is damaged.
    """
    if os.path.lexists(directory / SINGLE_FILE):
        return frozenset(tensor.name for tensor in read_shard_header(directory / SINGLE_FILE).tensors)
    if os.path.lexists(directory / INDEX_FILE):
        return frozenset(_read_index(directory / INDEX_FILE)[1])
    return None


def _read_index(path: Path) -> tuple[bytes, dict[str, str]]:
    """The index, and tensor name to file name; refuses names that could point outside the directory."""
    fix = "download or save the checkpoint again"
    try:
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the index: {error.strerror}", str(path), fix) from error
    try:
        weight_map = json.loads(content)["weight_map"]
        valid = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid or not weight_map:
        raise CheckpointError("the index is not JSON with a filled weight_map", str(path), fix)
    for file in dict.fromkeys(weight_map.values()):
        if "/" in file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"the index names {file!r}, which is not a plain safetensors file name", str(path), "do not trust it"
            )
    return content, weight_map


class SafetensorsWriter:
    """Writes the tensors of a `WeightFiles` in any order.

    Args:
        directory: exists; usually one from `staged_directory`, so that a half-written checkpoint is never seen.
        files: what will be written.
    """

    def __init__(self, directory: Path, files: WeightFiles) -> None:
        self.directory = directory
        self.files = files
        self._tensors = {tensor.name: tensor for tensor in files}
        self._missing_bytes = {tensor.name: tensor.num_bytes for tensor in files}
        self._streams: dict[str, StreamedFile] = {}
        for shard in files.shards:
            self._streams[shard.file] = StreamedFile(directory / shard.file)
            self._streams[shard.file].write(shard.header)

    def write(self, name: str, first_row: int, rows: torch.Tensor) -> None:
        """Write a block of rows, or a whole tensor.

        Args:
            name: a tensor of `files`.
            first_row: position of the block along dimension 0.
            rows: the block, in host memory, of the planned dtype.
        """
        stored = self._tensors[name]
        assert rows.dtype == stored.dtype and rows.shape[1:] == stored.shape[1:], f"{name}: {rows.dtype} {rows.shape}"
        data = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())
        row_bytes = len(data) // len(rows) if rows.dim() and len(rows) else 0
        stream = self._streams[stored.file]
        stream.seek(stored.begin_byte + first_row * row_bytes)
        stream.write(data)
        self._missing_bytes[name] -= len(data)

    def close(self) -> None:
        """Sync the files to disk and write the index."""
        incomplete = {name: missing for name, missing in self._missing_bytes.items() if missing}
        assert not incomplete, f"bytes not written (or written twice): {incomplete}"
        for stream in self._streams.values():
            stream.finish()
        if self.files.index is not None:
            write_durably(self.directory / INDEX_FILE, self.files.index)

    def abort(self) -> None:
        """Close the files without finishing them."""
        for stream in self._streams.values():
            stream.close()


def copy_assets(source: Path, target: Path, skip: Iterable[str] = ()) -> list[str]:
    """Copy configuration, generation, tokenizer, processor and chat template files bit for bit; never weights.

    Args:
        source: a Hugging Face directory.
        target: an existing directory.
        skip: patterns of files to leave out.

    Returns:
        The names copied, relative to `source`.
    """
    skipped = {path for pattern in skip for path in source.glob(pattern)}
    copied = []
    for path in sorted({path for pattern in ASSET_PATTERNS for path in source.glob(pattern)} - skipped):
        if path.is_file():
            name = path.relative_to(source)
            (target / name.parent).mkdir(exist_ok=True)
            copy_durably(path, target / name)
            copied.append(str(name))
            sync_directory((target / name).parent)
    return copied
