"""Small files: those that somebody else wrote are read with care, our own are replaced whole.

Nothing here imports torch, so that tools which only look at files start quickly.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

MAX_SMALL_FILE_BYTES = 64 * 2**20


def read_small(path: str | os.PathLike, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """Return the contents of a regular file; pipes and devices, which may block or never end, are not read.

    Args:
        path: the file; a link is followed.
        max_bytes: largest size that is read.

    Raises:
        OSError: it is missing or cannot be read, is no regular file, or is larger than `max_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise OSError(errno.EINVAL, f"this is {kind}, not a file", os.fspath(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes are too many (at most {max_bytes})", os.fspath(path))
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(max_bytes)
    finally:
        os.close(descriptor)


def read_end(path: str | os.PathLike, most_bytes: int) -> bytes:
    """Return the last lines of a regular file of any size, at most so many bytes, beginning with a whole line.

    Raises:
        OSError: it is missing, cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "this is no regular file", os.fspath(path))
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - most_bytes - 1))
        content = stream.read()
    return content if size <= most_bytes else content.partition(b"\n")[2]


def replace_durably(path: Path, content: str) -> None:
    """Write a small UTF-8 file, over one of that name if there is one: readers see the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
