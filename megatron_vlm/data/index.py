"""Random access to the rows of a JSONL file: byte offsets found in one streaming pass that also hashes the file.

The pass looks at line breaks and at each line's first byte, at the speed of the disk; it parses no JSON. Rows are
parsed when they are read, so a row that is not JSON is found when its turn comes (and by `--dry_run`, which parses all
rows). Only lines that do not begin with "{", and a last line that is cut short, are known at once. A file that holds
one JSON array has its elements as rows; a source of several files has the rows of one after those of another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.json_arrays import ArrayScanner, NotAnArrayError
from megatron_vlm.errors import DataError
from megatron_vlm.progress import Progress

BLOCK_BYTES = 8 * 2**20
NEWLINE = 10
SNIFFED_BYTES = 4096
_WRITE_JSONL = "write it as JSONL, one JSON object per line"
# Name, where its mark stands in the file, and the mark.
_OTHER_FORMATS = (
    ("a parquet file", 0, b"PAR1"),
    ("an Arrow file", 0, b"ARROW1"),
    ("a tar archive", 257, b"ustar"),
    ("a ZIP archive", 0, b"PK\x03\x04"),
    ("compressed (gzip)", 0, b"\x1f\x8b"),
    ("compressed (zstd)", 0, b"\x28\xb5\x2f\xfd"),
    ("compressed (xz)", 0, b"\xfd7zXZ"),
    ("compressed (bzip2)", 0, b"BZh"),
    ("a SQLite database", 0, b"SQLite format 3"),
)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonlIndex:
    """Byte offsets of the rows of a JSONL file, and a digest of its content."""

    path: str
    starts: np.ndarray
    """[rows] int64: offset of a row's first byte."""
    ends: np.ndarray
    """[rows] int64: offset past a row's last byte."""
    rows_after_blanks: np.ndarray
    """[blank lines] int64, ascending: the row that follows each blank line; blank lines are no rows."""
    size_bytes: int
    digest: str
    """BLAKE2b of the whole file, hexadecimal."""
    changed_ns: int
    """Time of the file's last change when it was indexed, of its file system."""
    unparsable_rows: tuple[int, ...]
    """Rows that are known not to be JSON objects without having parsed all rows."""
    is_array: bool = False
    """Whether the file is one JSON array."""

    @property
    def num_rows(self) -> int:
        return len(self.starts)


def build_index(path: str, progress: Progress | None = None) -> JsonlIndex:
    """Index a JSONL file, or a file with one JSON array.

    Args:
        path: the file.
        progress: advanced by the bytes that are read.

    Raises:
        DataError: the file is missing, unreadable, of another format, or has no rows.
    """
    refuse_what_is_no_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(SNIFFED_BYTES)
            _refuse_other_formats(path, start)
            file.seek(0)
            if start.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[":
                return _index_array(path, file, progress)
            changed_ns = os.fstat(file.fileno()).st_mtime_ns
            starts, first_bytes, newlines, size_bytes, digest = _scan(file, progress)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror})") from None
    ends = newlines if len(newlines) == len(starts) else np.append(newlines, size_bytes)
    index = JsonlIndex(path, starts, ends, np.empty(0, np.int64), size_bytes, digest, changed_ns, ())
    return _check_suspects(index, np.flatnonzero(first_bytes != ord("{")))


def refuse_what_is_no_file(path: str) -> None:
    """Make sure that a data file is there; it is not opened.

    Raises:
        DataError: it is missing, a directory, or no regular file.
    """
    if os.path.isdir(path):
        names = set(os.listdir(path))
        if {"dataset_info.json", "dataset_dict.json", "state.json"} & names:
            what, fix = "a Hugging Face data set on disk, which is not read", _WRITE_JSONL
        else:
            what, fix = "a directory", f"name a file in it, or a pattern such as {path.rstrip('/')}/*.jsonl"
        raise DataError(f"data file {path} is {what}", fix=fix)
    if not os.path.lexists(path):
        raise DataError(f"data file {path} does not exist", fix="give the path of a JSONL file")
    if not os.path.isfile(path):
        raise DataError(f"data file {path} is a broken link, a pipe or a device", fix="give the path of a JSONL file")


def _refuse_other_formats(path: str, start: bytes) -> None:
    for name, offset, magic in _OTHER_FORMATS:
        if start[offset : offset + len(magic)] == magic:
            raise DataError(f"data file {path} is {name}, which is not read", fix=_WRITE_JSONL)


def _index_array(path: str, file: Any, progress: Progress | None) -> JsonlIndex:
    changed_ns, digest, scanner, size_bytes = os.fstat(file.fileno()).st_mtime_ns, _new_digest(), ArrayScanner(), 0
    try:
        for block in _blocks(file, digest, progress):
            scanner.take(block)
            size_bytes += len(block)
        starts, ends = scanner.finish()
    except NotAnArrayError as error:
        raise DataError(
            f"data file {path} begins like a JSON array of objects and is none: {error}",
            fix="write one JSON object per line, or one array of objects",
        ) from None
    if not len(starts):
        raise DataError(f"data file {path} has no rows", fix="write one JSON object per line")
    blanks = np.empty(0, np.int64)
    return JsonlIndex(path, starts, ends, blanks, size_bytes, digest.hexdigest(), changed_ns, (), is_array=True)


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _blocks(file: Any, digest: Any, progress: Progress | None) -> Iterator[bytes]:
    """Yield the blocks of an open file, each added to its digest."""
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
        yield block
        if progress is not None:
            progress.advance(len(block))


def _scan(file: Any, progress: Progress | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, str]:
    """Return line starts, each line's first byte, newline offsets, size and digest of an open file."""
    digest = _new_digest()
    starts, first_bytes, newlines = [], [], []
    offset, last_byte = 0, NEWLINE
    for block in _blocks(file, digest, progress):
        array = np.frombuffer(block, np.uint8)
        is_newline = array == NEWLINE
        starts_line = np.concatenate(([last_byte == NEWLINE], is_newline[:-1]))
        starts.append(np.flatnonzero(starts_line) + offset)
        first_bytes.append(array[starts_line])
        newlines.append(np.flatnonzero(is_newline) + offset)
        offset, last_byte = offset + len(block), block[-1]
    empty = [np.empty(0, np.int64)]
    joined = [np.concatenate(arrays or empty) for arrays in (starts, first_bytes, newlines)]
    return joined[0], joined[1], joined[2], offset, digest.hexdigest()


def _check_suspects(index: JsonlIndex, suspects: np.ndarray) -> JsonlIndex:
    """Drop blank lines, and record which of the suspect lines are not JSON objects."""
    rows = JsonlRows(index)
    blank, unparsable = [], []
    # The last line is parsed because an interrupted copy cuts it short.
    for line in sorted({*suspects.tolist(), *range(index.num_rows)[-1:]}):
        text = rows.read(line).strip()
        if not text:
            blank.append(line)
        elif not _is_json_object(text):
            unparsable.append(line)
    keep = np.ones(index.num_rows, bool)
    keep[blank] = False
    if not keep.any():
        raise DataError(f"data file {index.path} has no rows", fix="write one JSON object per line")
    row_of_line = np.cumsum(keep) - 1
    return JsonlIndex(
        index.path,
        index.starts[keep],
        index.ends[keep],
        row_of_line[blank] + 1,
        index.size_bytes,
        index.digest,
        index.changed_ns,
        tuple(int(row_of_line[line]) for line in unparsable),
    )


def _is_json_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class JsonlRows:
    """The rows of an indexed file; safe to share with forked and spawned worker processes."""

    def __init__(self, index: JsonlIndex) -> None:
        self.index = index
        self.directory = Path(index.path).parent
        self._descriptor: int | None = None

    def read(self, row: int) -> bytes:
        """Return the text of row `row` (from 0), without a byte order mark.

        Raises:
            DataError: the file was changed since it was indexed.
        """
        if self._descriptor is None:
            self._descriptor = os.open(self.index.path, os.O_RDONLY)
        start, end = int(self.index.starts[row]), int(self.index.ends[row])
        # pread keeps no position, so forked processes may share the descriptor.
        text = os.pread(self._descriptor, end - start, start)
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.index.size_bytes, self.index.changed_ns):
            raise DataError(
                "the file was changed or replaced since it was indexed",
                self.name(row),
                "put it back, or start again with a new run_dir; data files must not change during a run",
            )
        return text.removeprefix(BYTE_ORDER_MARK) if start == 0 else text

    def name(self, row: int) -> str:
        """Return the file and line number of a row, as error messages and reports name it; of an array, the index."""
        if self.index.is_array:
            return f"{self.index.path}[{row}]"
        blanks_before = int(np.searchsorted(self.index.rows_after_blanks, row, side="right"))
        return f"{self.index.path}:{row + blanks_before + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
