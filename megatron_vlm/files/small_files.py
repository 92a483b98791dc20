"""Reading small files that somebody else wrote: only regular ones, and only up to a size."""

from __future__ import annotations

import errno
import os
import stat

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
