"""Files read and written in pieces, and directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.block_memory import BlockMemory
from megatron_vlm.files.small_files import sync_directory

# Measured on ext4: files written in larger requests take up to four times as long. `cp` uses this size too.
REQUEST_BYTES = 256 * 2**10
ABANDONED_SECONDS = 600.0


class StreamedFile(FileIO):
    """A new file, written without a buffer in requests of a size that the file system likes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+b")
        self.path = path

    def write(self, data: Any) -> int:
        """Write all of `data` at the current position."""
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            position += super().write(view[position : position + REQUEST_BYTES]) or 0
        return position

    def finish(self) -> None:
        """Sync to disk and close."""
        os.fsync(self.fileno())
        self.close()


def read_bytes(descriptor: int, offset_byte: int, num_bytes: int, memory: BlockMemory | None = None) -> torch.Tensor:
    """A range of an open file as a tensor of uint8.

    Args:
        descriptor: of the file.
        offset_byte: where the range begins.
        num_bytes: its length.
        memory: to read into; otherwise the result has memory of its own.

    Raises:
        EOFError: the file ends before the range does.
    """
    values = (memory or BlockMemory()).take((num_bytes,), torch.uint8)
    view = memoryview(values.numpy())
    position = 0
    while position < num_bytes:
        count = os.preadv(descriptor, [view[position:]], offset_byte + position)
        if count == 0:
            raise EOFError(f"the file ends before byte {offset_byte + num_bytes}")
        position += count
    return values


def check_export_target(directory: str | os.PathLike) -> Path:
    """Refuse a directory that holds anything; a missing or empty one is fine.

    Call it before the expensive part of the work starts: an export never overwrites.

    Args:
        directory: where a checkpoint is going to be written.

    Returns:
        The same directory as an absolute path.

    Raises:
        CheckpointError: the path is a file or a directory that is not empty.
    """
    target = Path(directory).absolute()
    if target.is_dir():
        if next(target.iterdir(), None) is not None:
            raise CheckpointError(
                "the target directory is not empty", str(target), "name a new directory, or empty this one first"
            )
    elif target.exists() or target.is_symlink():
        raise CheckpointError("the target exists and is not a directory", str(target), "name a new directory")
    return target


@contextmanager
def staged_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling that becomes `directory` by one rename when the block ends without an error.

    Parents are created. Whoever writes files into the sibling syncs them to disk; the directory entries are synced
    here. After an error the sibling is removed; after a kill it stays behind under a name that starts with a dot, until
    a later call for the same place.

    Args:
        directory: the final place, missing or empty.

    Yields:
        The temporary directory to write into.
    """
    target = check_export_target(directory)
    _remove_abandoned(target)
    staging = target.parent / f".{target.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        sync_directory(staging)
        os.rename(staging, check_export_target(target))
        sync_directory(target.parent)
    except OSError as error:
        raise writing_failed(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def writing_failed(error: OSError, target: Path) -> CheckpointError:
    """Return the error for the user."""
    return CheckpointError(
        f"writing failed: {error.strerror or error}", str(target), "make room, or name another directory"
    )


def _remove_abandoned(target: Path) -> None:
    """Remove siblings of earlier calls that nobody writes any more.

    That is: no process of the number in their name runs on this machine, and nothing in them has changed for a while;
    a container of the same name may not see another's processes.
    """
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(FileNotFoundError):
            changed = max(each.stat().st_mtime for each in (path, *path.iterdir()))
            if time.time() - changed > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and sync it to disk."""
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy a small file bit for bit (a link is followed) and sync it to disk."""
    write_durably(target, source.read_bytes())
