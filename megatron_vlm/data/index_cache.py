"""Indexes of large data files, built by one process of each node and mapped into memory by all others.

Ranks of a node that need the index of a file find it in a folder of the node's temporary directory (`TMPDIR`, else
/tmp); the first that does not find it builds it under a lock, and the others wait. Later starts on the node find it,
too, so that a resumed run does not read its data files again. An index holds for a file of the same path, size and
times of change. Its arrays are starts, ends, rows after blank lines, and rows that are no JSON objects, int64.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.array_files import (
    UnusableError,
    locked,
    map_arrays,
    node_folder,
    own_folder,
    reason_of,
    store_arrays,
)
from megatron_vlm.data.index import JsonlIndex, build_index
from megatron_vlm.errors import DataError
from megatron_vlm.progress import Progress

SMALLEST_STORED_BYTES = 64 * 2**10
"""Smaller files are indexed anew by every process, which takes no longer than opening an index."""
LEAST_ROW_BYTES = 128
"""Rows are taken to be no shorter where it is asked beforehand whether an index has room on the disk."""
VERSION = 2
_NUMBER = np.dtype("<i8")
_FACTS = ("digest", "size_bytes", "changed_ns", "is_array")
_ARRAYS = ("starts", "ends", "rows_after_blanks", "unparsable_rows")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredIndex(JsonlIndex):
    """An index whose numbers are mapped from a file; other processes are given the file's name, not the numbers."""

    stored_at: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.stored_at, self.path)


def find_or_build_index(path: str, progress: Progress | None = None) -> JsonlIndex:
    """Return the index of a data file: the node's, or one in this process' memory where the file is small.

    Where the folder for indexes cannot be used, the index is built in memory, with a warning.

    Args:
        path: the file.
        progress: advanced by the bytes that are read or known already.

    Raises:
        DataError: see `build_index`.
    """
    try:
        if os.stat(path).st_size < SMALLEST_STORED_BYTES or not os.path.isfile(path):
            return build_index(path, progress)
    except OSError:
        return build_index(path, progress)  # which says what is wrong with it
    try:
        return _find_or_store(path, progress)
    except (OSError, UnusableError) as error:
        _warn(path, error)
    return build_index(path, progress)


def _find_or_store(path: str, progress: Progress | None) -> JsonlIndex:
    folder = own_folder()
    identity = hashlib.blake2b(os.path.abspath(path).encode(errors="surrogateescape"), digest_size=12).hexdigest()

    def find() -> StoredIndex | None:
        state = _file_state(path)
        place = folder / f"{identity}.{_digest_of(state)}.index"
        with contextlib.suppress(FileNotFoundError, UnusableError):
            index = _map_index(place, path)
            if progress is not None:
                progress.advance(index.size_bytes)
            return index
        return None

    if (found := find()) is not None:
        return found
    if shutil.disk_usage(folder).free < os.stat(path).st_size // LEAST_ROW_BYTES * 2 * _NUMBER.itemsize:
        raise UnusableError("its disk is full")
    with locked(folder / f"{identity}.lock", lambda: progress.advance(0) if progress is not None else None):
        if (found := find()) is not None:
            return found
        state = _file_state(path)
        index = build_index(path, progress)
        if _file_state(path) != state:
            raise DataError(f"data file {path} was changed while it was indexed", fix="start again once it is complete")
        for outdated in folder.glob(f"{identity}.*.index*"):
            outdated.unlink(missing_ok=True)
        place = folder / f"{identity}.{_digest_of(state)}.index"
        try:
            _store(place, index)
        except OSError as error:
            _warn(path, error)
            return index
        return _map_index(place, path)


def _warn(path: str, error: Exception) -> None:
    """Say it once for a node: its first rank reads rows if any of its ranks does."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        where = f" in {node_folder()}"
    except OSError:  # there is no temporary directory at all, which is the reason
        where = ""
    logger.warning(
        "each rank indexes %s in its own memory: indexes cannot be kept%s (%s); "
        "point TMPDIR at a folder of the node that you can write to",
        *(path, where, reason_of(error)),
    )


def _file_state(path: str) -> tuple[int, ...]:
    """Return what changes when a file does; the time of its last change of any kind cannot be set back."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest_of(state: tuple[int, ...]) -> str:
    return hashlib.blake2b(repr((VERSION, *state)).encode(), digest_size=12).hexdigest()


def _store(place: Path, index: JsonlIndex) -> None:
    arrays = {name: np.asarray(getattr(index, name), _NUMBER) for name in _ARRAYS}
    store_arrays(place, {name: getattr(index, name) for name in _FACTS}, arrays)


def _map_index(place: Path, path: str) -> StoredIndex:
    """Map the index in the file `place` of the data file `path`; errors are those of `map_arrays`."""
    facts, arrays = map_arrays(place)
    try:
        numbers = {name: arrays[name] for name in _ARRAYS}
        known: dict[str, Any] = {name: facts[name] for name in _FACTS}
    except LookupError as error:
        raise UnusableError(f"it is damaged ({error})") from None
    known |= numbers | {"unparsable_rows": tuple(numbers["unparsable_rows"].tolist())}
    return StoredIndex(path=path, stored_at=str(place), **known)


def _open_again(stored_at: str, path: str) -> StoredIndex:
    """Map an index in another process of the rank that found it."""
    try:
        return _map_index(Path(stored_at), path)
    except (OSError, UnusableError) as error:
        raise DataError(
            f"the index of {path} is gone: {error}", stored_at, "start again, which builds it anew"
        ) from None
