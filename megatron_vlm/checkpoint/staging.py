"""Directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vlm.errors import CheckpointError


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
    target = Path(directory).expanduser().absolute()
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
    here. After an error the sibling is removed; after a kill it stays behind under a name that starts with a dot.

    Args:
        directory: the final place, missing or empty.

    Yields:
        The temporary directory to write into.
    """
    target = check_export_target(directory)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".{target.name}.partial-{os.getpid()}"
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write there: {error.strerror}", str(target), "name another directory") from error
    try:
        yield staging
        sync_directory(staging)
        os.rename(staging, check_export_target(target))
        sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make the names inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and sync it to disk."""
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy a small file bit for bit (a link is followed) and sync it to disk."""
    write_durably(target, source.read_bytes())
