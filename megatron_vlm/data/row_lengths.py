"""What every row of a data source takes in a batch, known before anything is decoded, in a file of the node.

A file holds for the contents of its source at its path (media lie beside it), for the processor, template and rules of
the model, for the settings that change a length, and for the programs that compute it: its name is a digest of all
that. Of media it knows nothing: a row whose image was replaced is refused when it is read (`RowReader.read_measured`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.data.array_files import (
    UnusableError,
    locked,
    map_arrays,
    own_folder,
    reason_of,
    store_arrays,
)
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.data.rows import RowReader

ARRAYS = {
    "tokens": np.int32,
    "patches": np.int32,
    "patch_pairs": np.int64,
    "audio_frames": np.int32,
    "status": np.uint8,
}
# What computes ids, sizes of images and frames of audio.
_PACKAGES = "transformers tokenizers jinja2 torchvision pillow av soundfile soxr".split()
# What a tokenizer is made from; the processor says itself what it was made from, and the template is known.
_TOKENIZER_FILES = "tokenizer* special_tokens_map.json added_tokens.json tekken.json vocab.* merges.txt *.model".split()
# Settings of data that change a length or a status; those of pixels are the processor's by now.
_SETTINGS = "seq_length too_long train_thinking drop_empty_answers allow_urls allow_private_urls".split()
logger = logging.getLogger(__name__)


class RowStatus(IntEnum):
    """What becomes of a row."""

    OK = 0
    BAD = 1
    TOO_LONG = 2
    """Longer than data.seq_length, and not cut."""
    TRUNCATED = 3
    EMPTY = 4
    """All of its answers are empty and dropped."""


PADDING_STATUSES = (RowStatus.BAD, RowStatus.TOO_LONG, RowStatus.EMPTY)
"""Of rows that become a padding sample."""


@dataclass(frozen=True)
class RowLengths:
    """What the rows of one source take in a batch; arrays [rows], mapped from a file.

    Other processes are given the file's name, not the arrays.
    """

    tokens: np.ndarray
    """int32: length in tokens; 1 of a row that becomes a padding sample."""
    patches: np.ndarray
    """int32: patches of its images and videos."""
    patch_pairs: np.ndarray
    """int64: over its images and frames of videos, the sum of the squares of their numbers of patches."""
    audio_frames: np.ndarray
    """int32: frames of its clips of audio."""
    status: np.ndarray
    """uint8: a `RowStatus`."""
    stored_at: str
    """The file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.stored_at,)

    def count(self, status: RowStatus) -> int:
        """Return how many rows have a status."""
        return int(np.count_nonzero(self.status == status))


@dataclass(frozen=True)
class LengthsFile:
    """Where the lengths of a source's rows are on this node, or will be.

    Attributes:
        place: of the file.
        facts: what the lengths follow from.
        num_rows: rows of the source.
    """

    place: Path
    facts: Mapping[str, Any]
    num_rows: int

    def find(self) -> RowLengths | None:
        """Return the lengths, None where they are not; a file that cannot be used is named, once on a node."""
        try:
            return _map_lengths(self.place, self.facts)
        except FileNotFoundError:
            return None
        except (OSError, UnusableError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                reason = reason_of(error)
                logger.warning("lengths of rows are measured anew: %s is of no use (%s)", self.place, reason)
            return None

    def store(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep lengths, and drop those of what the source contained before.

        Args:
            arrays: [rows], by the names in `ARRAYS`.

        Raises:
            DataError: they cannot be kept.
        """
        identity, contents, *_ = self.place.name.split(".")
        with _in_folder(), locked(self.place.with_name(f"{identity}.lock")):
            for other in self.place.parent.glob(f"{identity}.*.lengths"):
                if other.name.split(".")[1] != contents:
                    other.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError, UnusableError):
                _map_lengths(self.place, self.facts)
                return
            store_arrays(self.place, self.facts, arrays)


def find_row_lengths(reader: RowReader) -> list[RowLengths]:
    """Return the lengths of the rows of each of a reader's sources, once they were measured on this node.

    Raises:
        DataError: a file of lengths is missing or of no use.
    """
    try:
        return [_map_lengths(file.place, file.facts) for file in lengths_files(reader)]
    except (OSError, UnusableError) as error:
        raise DataError(
            f"the lengths of rows are gone from this node: {reason_of(error)}",
            fix="start again; they are measured anew",
        ) from None


def measured_as_bad(name: str, lengths: RowLengths) -> DataError:
    """Return what is wrong with a row that could not be used when it was measured, and could be now.

    Args:
        name: file and line of the row.
        lengths: of its source.
    """
    return DataError(
        "it could not be used when lengths were measured, and now it can be",
        name,
        f"delete {lengths.stored_at} on every node, and start again with a new run_dir",
    )


def lengths_files(reader: RowReader) -> list[LengthsFile]:
    """Return where the lengths of each of a reader's sources are on this node, or will be.

    Raises:
        DataError: the folder for them cannot be used.
    """
    with _in_folder():
        folder = own_folder()
    shared, files = _facts_of_reader(reader), []
    for rows in reader.sources:
        paths = [os.path.abspath(file.index.path) for file in rows.files]
        facts = {"paths": paths, "contents": rows.digest, **shared}
        name = f"{digest_of(paths)}.{rows.digest[:16]}.{digest_of(facts)}.lengths"
        files.append(LengthsFile(folder / name, facts, rows.num_rows))
    return files


def digest_of(content: Any) -> str:
    """Return a digest of what JSON can express, hexadecimal."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _in_folder() -> Iterator[None]:
    """Turn errors of the folder for files of this node into one that says what to do."""
    try:
        yield
    except (OSError, UnusableError) as error:
        raise DataError(
            f"lengths of rows, which data.packing needs, cannot be kept on this node ({reason_of(error)})",
            fix="point TMPDIR at a folder of the node that you can write to",
        ) from None


def _facts_of_reader(reader: RowReader) -> dict[str, Any]:
    """Return what lengths follow from besides rows: settings in words, all else as digests."""
    builder, rules, settings = reader.builder, reader.builder.rules, reader.settings
    code = [*Path(__file__).parent.glob("*.py")]
    if rules.media is not None:
        pack: Any = rules.media.pack
        code.append(Path(sys.modules[getattr(pack, "func", pack).__module__].__file__ or ""))
    tokenizer = {path for pattern in _TOKENIZER_FILES for path in Path(builder.hf_path).glob(pattern) if path.is_file()}
    processor = builder.processor.to_dict() if rules.media is not None else {}
    kept = {name: getattr(settings, name) for name in _SETTINGS}
    if kept["too_long"] == "error":
        kept["too_long"] = "drop"  # which gives the same lengths
    return {
        "settings": kept,
        "processor": digest_of(_plain(processor)),
        "tokenizer": _digest_of_files(tokenizer),
        "template": digest_of(builder.template),
        "rules": digest_of(_plain(rules)),
        "packages": {name: _version(name) for name in _PACKAGES},
        "code": _digest_of_files(code),
    }


def _plain(value: Any) -> Any:
    """Return what JSON can express of a value; functions are named."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{value.__module__}.{value.__qualname__}"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _digest_of_files(paths: Any) -> str:
    return digest_of([[path.name, hashlib.blake2b(path.read_bytes()).hexdigest()] for path in sorted(paths)])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _map_lengths(place: Path, expected: Mapping[str, Any] | None = None) -> RowLengths:
    """Map a file of lengths; `expected` is what they should follow from, None where its name is trusted."""
    facts, arrays = map_arrays(place)
    if {name: array.dtype for name, array in arrays.items()} != {name: np.dtype(kind) for name, kind in ARRAYS.items()}:
        raise UnusableError("it has other arrays")
    if expected is not None and (
        different := sorted(name for name in {*facts, *expected} if facts.get(name) != expected.get(name))
    ):
        raise UnusableError(f"it was made for another {', another '.join(different)}")
    return RowLengths(**arrays, stored_at=str(place))


def _open_again(stored_at: str) -> RowLengths:
    """Map lengths in another process, on this node or on another one, whose folder may have another name."""
    try:
        place = Path(stored_at)
        return _map_lengths(place if place.exists() else own_folder() / place.name)
    except (OSError, UnusableError) as error:
        raise DataError(
            f"the lengths of rows are gone: {reason_of(error)}", stored_at, "start again, which measures them anew"
        ) from None
