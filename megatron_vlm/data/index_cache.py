"""Indexes of large data files, built by one process of each node and mapped into memory by all others.

Ranks of a node that need the index of a file find it in a folder of the node's temporary directory (`TMPDIR`, else
/tmp); the first that does not find it builds it under a lock, and the others wait. Later starts on the node find it,
too, so that a resumed run does not read its data files again. An index holds for a file of the same path, size and
times of change; one that is damaged, cut short or of another user is not used.

File format: the length of a JSON header (8 bytes), the header, zeros up to a multiple of 8, and int64 numbers: starts,
ends, rows after blank lines, rows that are no JSON objects. The header has their counts, and the CRC-32 of all this.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from megatron_vlm.data.index import JsonlIndex, build_index
from megatron_vlm.errors import DataError
from megatron_vlm.progress import Progress

SMALLEST_STORED_BYTES = 64 * 2**10
"""Smaller files are indexed anew by every process, which takes no longer than opening an index."""
LEAST_ROW_BYTES = 128
"""Rows are taken to be no shorter where it is asked beforehand whether an index has room on the disk."""
VERSION = 1
WAIT_SECONDS = 0.05
_NUMBER = np.dtype("<i8")
_FACTS = ("digest", "size_bytes", "changed_ns", "is_array", "counts")
_ARRAYS = ("starts", "ends", "rows_after_blanks", "unparsable_rows")
logger = logging.getLogger(__name__)


class _UnusableError(Exception):
    """An index, or the folder for indexes, cannot be used; the message says why."""


@dataclass(frozen=True)
class StoredIndex(JsonlIndex):
    """An index whose numbers are mapped from a file; other processes are given the file's name, not the numbers."""

    stored_at: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.stored_at, self.path)


def index_folder() -> Path:
    """Return the folder of this user's indexes on this node."""
    return Path(tempfile.gettempdir()) / f"megatron_vlm-indexes-{os.getuid()}"


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
    except (OSError, _UnusableError) as error:
        _warn(path, error)
    return build_index(path, progress)


def _find_or_store(path: str, progress: Progress | None) -> JsonlIndex:
    folder = _own_folder()
    identity = hashlib.blake2b(os.path.abspath(path).encode(errors="surrogateescape"), digest_size=12).hexdigest()

    def find() -> StoredIndex | None:
        state = _file_state(path)
        place = folder / f"{identity}.{_digest_of(state)}.index"
        with contextlib.suppress(FileNotFoundError, _UnusableError):
            index = _map_index(place, path)
            if progress is not None:
                progress.advance(index.size_bytes)
            return index
        return None

    if (found := find()) is not None:
        return found
    if shutil.disk_usage(folder).free < os.stat(path).st_size // LEAST_ROW_BYTES * 2 * _NUMBER.itemsize:
        raise _UnusableError("its disk is full")
    with _locked(folder / f"{identity}.lock", progress):
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
    reason = f"{error.strerror} [{error.filename}]" if isinstance(error, OSError) else str(error)
    try:
        where = f" in {index_folder()}"
    except OSError:  # there is no temporary directory at all, which is the reason
        where = ""
    logger.warning(
        "each rank indexes %s in its own memory: indexes cannot be kept%s (%s); "
        "point TMPDIR at a folder of the node that you can write to",
        *(path, where, reason),
    )


def _file_state(path: str) -> tuple[int, ...]:
    """Return what changes when a file does; the time of its last change of any kind cannot be set back."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest_of(state: tuple[int, ...]) -> str:
    return hashlib.blake2b(repr((VERSION, *state)).encode(), digest_size=12).hexdigest()


def _own_folder() -> Path:
    """Return the folder, made if need be; nobody else may have made it, or write to it."""
    folder = index_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise _UnusableError("it is no folder, or others may write to it")
    return folder


@contextlib.contextmanager
def _locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold a lock that no other process of the node holds; it is released when its process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(WAIT_SECONDS)
                if progress is not None:
                    progress.advance(0)
        yield
    finally:
        os.close(descriptor)


def _store(place: Path, index: JsonlIndex) -> None:
    """Write an index under a temporary name and rename it once it is on disk."""
    arrays = [np.asarray(getattr(index, name), _NUMBER) for name in _ARRAYS]
    facts = {
        "digest": index.digest,
        "size_bytes": index.size_bytes,
        "changed_ns": index.changed_ns,
        "is_array": index.is_array,
        "counts": [len(array) for array in arrays],
    }
    header = json.dumps(facts | {"crc": _checksum(facts, arrays)}).encode()
    header += b" " * (-len(header) % _NUMBER.itemsize)
    partial = place.with_suffix(f".index.partial-{os.getpid()}")
    try:
        with partial.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in arrays:
                file.write(memoryview(array).cast("B") if len(array) else b"")
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(facts: dict[str, Any], arrays: Sequence[np.ndarray]) -> int:
    """Return the CRC-32 of numbers and of what else the header says."""
    checksum = isal_zlib.crc32(json.dumps({name: facts[name] for name in _FACTS}).encode())
    for array in arrays:
        checksum = isal_zlib.crc32(array, checksum)
    return checksum


def _map_index(place: Path, path: str) -> StoredIndex:
    """Map the index in the file `place` of the data file `path`.

    Raises:
        FileNotFoundError: there is none.
        _UnusableError: it is damaged, or another user's.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid():
            raise _UnusableError("it is another user's")
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(header_bytes, status.st_size)))
            counts = [int(count) for count in header["counts"]]
            if status.st_size != 8 + header_bytes + sum(counts) * _NUMBER.itemsize:
                raise _UnusableError("it is cut short")
            numbers = np.memmap(file, _NUMBER, "r", 8 + header_bytes, sum(counts)).view(np.ndarray)
            if _checksum(header, [numbers]) != header.pop("crc"):
                raise _UnusableError("its contents are not what was written")
            starts, ends, blanks, unparsable = np.split(numbers, np.cumsum(counts)[:-1])
            return StoredIndex(
                path,
                starts,
                ends,
                blanks,
                header["size_bytes"],
                header["digest"],
                header["changed_ns"],
                tuple(unparsable.tolist()),
                header["is_array"],
                str(place),
            )
        except (ValueError, TypeError, LookupError) as error:
            raise _UnusableError(f"it is damaged ({error})") from None


def _open_again(stored_at: str, path: str) -> StoredIndex:
    """Map an index in another process of the rank that found it."""
    try:
        return _map_index(Path(stored_at), path)
    except (OSError, _UnusableError) as error:
        raise DataError(
            f"the index of {path} is gone: {error}", stored_at, "start again, which builds it anew"
        ) from None
