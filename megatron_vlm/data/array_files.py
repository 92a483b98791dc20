"""Arrays in files of a node, written by one of its processes and mapped into memory by all others.

They lie in a folder of the node's temporary directory (`TMPDIR`, else /tmp). A file that is damaged, cut short or of
another user is not used, nor a folder to which others may write.

File format: the length of a JSON header (8 bytes), the header, zeros up to a multiple of 8, and the arrays, each with
zeros up to a multiple of 8. The header has facts, the arrays' names, types and lengths, and the CRC-32 of all this.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

WAIT_SECONDS = 0.05
_ALIGNMENT = 8


class UnusableError(Exception):
    """A file, or the folder for files, cannot be used; the message says why."""


def node_folder() -> Path:
    """Return the folder of this user's files on this node."""
    return Path(tempfile.gettempdir()) / f"megatron_vlm-indexes-{os.getuid()}"


def own_folder() -> Path:
    """Return the folder, made if need be.

    Raises:
        UnusableError: somebody else made it, or may write to it.
        OSError: it cannot be made.
    """
    folder = node_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UnusableError(f"{folder} is no folder, or others may write to it")
    return folder


@contextlib.contextmanager
def locked(path: Path, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock that no other process of the node holds; it is released when its process ends, however it ends.

    Args:
        path: of the lock's file.
        while_waiting: called now and then while another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(WAIT_SECONDS)
                while_waiting()
        yield
    finally:
        os.close(descriptor)


def store_arrays(place: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of one dimension under a temporary name, and rename the file once it is on disk.

    Args:
        place: of the file.
        facts: what JSON can express.
        arrays: by name.

    Raises:
        OSError: that fails; nothing is left behind.
    """
    contents = [np.ascontiguousarray(array) for array in arrays.values()]
    described = [[name, array.dtype.str, len(array)] for name, array in zip(arrays, contents, strict=True)]
    head = {"facts": dict(facts), "arrays": described}
    header = json.dumps(head | {"crc": _checksum(head, contents)}).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        with partial.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in contents:
                file.write(memoryview(array).cast("B") if len(array) else b"")
                file.write(bytes(-array.nbytes % _ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def map_arrays(place: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Map a file that `store_arrays` wrote; returns its facts, and its arrays, which cannot be written to.

    Raises:
        FileNotFoundError: there is none.
        UnusableError: it is damaged, or another user's.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid():
            raise UnusableError("it is another user's")
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            head = json.loads(file.read(min(header_bytes, status.st_size)))
            checksum = head.pop("crc")
            sizes = [(name, np.dtype(kind), int(length)) for name, kind, length in head["arrays"]]
            padded = [math.ceil(kind.itemsize * length / _ALIGNMENT) * _ALIGNMENT for _, kind, length in sizes]
            if status.st_size != 8 + header_bytes + sum(padded):
                raise UnusableError("it is cut short")
            mapped = np.memmap(file, np.uint8, "r", 8 + header_bytes, sum(padded)).view(np.ndarray)
            parts = np.split(mapped, np.cumsum(padded)[:-1])
            arrays = {
                name: part[: kind.itemsize * length].view(kind)
                for part, (name, kind, length) in zip(parts, sizes, strict=True)
            }
            if _checksum(head, [*arrays.values()]) != checksum:
                raise UnusableError("its contents are not what was written")
            return head["facts"], arrays
        except (ValueError, TypeError, LookupError) as error:
            raise UnusableError(f"it is damaged ({error})") from None


def reason_of(error: Exception) -> str:
    """Return why a file or the folder cannot be used, for messages."""
    if not isinstance(error, OSError):
        return str(error)
    # A failed write names no file, and one of an open file its number.
    is_named = isinstance(error.filename, str | os.PathLike)
    return f"{error.strerror} [{error.filename}]" if is_named else str(error.strerror)


def _checksum(head: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> int:
    """Return the CRC-32 of arrays and of what else the header says."""
    checksum = isal_zlib.crc32(json.dumps(head).encode())
    for array in arrays:
        checksum = isal_zlib.crc32(array, checksum)
    return checksum
