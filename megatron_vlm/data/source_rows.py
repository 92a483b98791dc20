"""The rows of data sources: those of one file, or of all files that match a pattern, one after another."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.index import JsonlRows, refuse_what_is_no_file
from megatron_vlm.data.index_cache import find_or_build_index
from megatron_vlm.errors import DataError
from megatron_vlm.progress import Progress


def expand(path: str) -> list[str]:
    """Return the files that a source's path names: itself, or all that match its pattern, sorted.

    Raises:
        DataError: no file matches.
    """
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"no file matches {path}", fix="give the path of a JSONL file, or a pattern that matches some")
    return found


def check_source(path: str) -> None:
    """Make sure that every file of a source is there; none is opened.

    Raises:
        DataError: no file matches, or one is missing or no regular file.
    """
    for file in expand(path):
        refuse_what_is_no_file(file)


class SourceRows:
    """The rows of one source: those of its file, or of the files that match its pattern, one after another.

    Args:
        path: of a file, or a pattern.
        progress: advanced by the bytes that are read.

    Raises:
        DataError: see `expand` and `build_index`.
    """

    def __init__(self, path: str, progress: Progress | None = None) -> None:
        self.path = path
        self.files = [JsonlRows(find_or_build_index(file, progress)) for file in expand(path)]
        self._firsts = np.cumsum([0, *(file.index.num_rows for file in self.files)])
        self.num_rows = int(self._firsts[-1])

    @property
    def digest(self) -> str:
        """Of the contents of all files in their order; that of a single file is its own."""
        digests = [file.index.digest for file in self.files]
        return (
            digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        )

    @property
    def unparsable_rows(self) -> list[int]:
        """Rows that are known not to be JSON objects without having parsed all rows."""
        parts = zip(self._firsts[:-1].tolist(), self.files, strict=True)
        return [first + row for first, file in parts for row in file.index.unparsable_rows]

    def row_bytes(self) -> np.ndarray:
        """Return how many bytes of text each row has, [rows] int64."""
        return np.concatenate([file.index.ends - file.index.starts for file in self.files])

    def locate(self, row: int) -> tuple[JsonlRows, int]:
        """Return the file that a row is in, and its number there."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self.files[number], row - int(self._firsts[number])

    def name(self, row: int) -> str:
        """Return the file and line number of a row."""
        file, row = self.locate(row)
        return file.name(row)


def index_sources(paths: Sequence[str]) -> list[SourceRows]:
    """Index the files of all sources, and show how far that has come; errors are those of `SourceRows`."""
    files = [file for path in paths for file in expand(path)]
    total_bytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    label = f"indexing {files[0] if len(files) == 1 else f'{len(files)} data files'}"
    with Progress(label, total_bytes) as progress:
        return [SourceRows(path, progress) for path in paths]
