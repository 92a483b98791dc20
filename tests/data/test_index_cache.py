"""Indexes kept for all ranks of a node: built once, mapped, built anew where they do not hold, in memory at worst."""

import json
import logging
import os
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data import array_files, index_cache
from megatron_vlm.data.array_files import node_folder
from megatron_vlm.data.index import JsonlIndex, JsonlRows, build_index
from megatron_vlm.data.index_cache import StoredIndex, find_or_build_index
from megatron_vlm.data.source_rows import SourceRows

NUM_ROWS = 3000


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a temporary directory of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def data_file(tmp_path: Path) -> str:
    """Rows with blank lines and rows that are no JSON among them."""
    lines = [json.dumps({"row": row, "text": "x" * (row % 50)}) for row in range(NUM_ROWS)]
    lines[7], lines[100] = "no JSON", ""
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that this process hashes and indexes."""
    built: list[str] = []

    def counted(path: str, *arguments: Any) -> JsonlIndex:
        built.append(path)
        return build_index(path, *arguments)

    monkeypatch.setattr(index_cache, "build_index", counted)
    return built


def same(left: JsonlIndex, right: JsonlIndex) -> bool:
    plain = ("path", "num_rows", "size_bytes", "digest", "changed_ns", "unparsable_rows", "is_array")
    arrays = ("starts", "ends", "rows_after_blanks")
    return all(getattr(left, name) == getattr(right, name) for name in plain) and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays
    )


def test_stored_index_equals_one_in_memory(data_file: str, builds: list[str]) -> None:
    whole = build_index(data_file)
    for index in (find_or_build_index(data_file), find_or_build_index(data_file)):
        assert isinstance(index, StoredIndex) and same(index, whole)
        rows = JsonlRows(index)
        assert json.loads(rows.read(NUM_ROWS - 2))["row"] == NUM_ROWS - 1
        assert rows.name(NUM_ROWS - 2) == f"{data_file}:{NUM_ROWS}"
    assert builds == [data_file]
    assert SourceRows(data_file).digest == whole.digest


def test_numbers_are_mapped_and_not_pickled(data_file: str) -> None:
    rows = JsonlRows(find_or_build_index(data_file))
    assert not rows.index.starts.flags.owndata and not rows.index.starts.flags.writeable
    assert isinstance(rows.index, StoredIndex)
    mappings = Path("/proc/self/maps").read_text()
    assert rows.index.stored_at in mappings
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000 < rows.index.starts.nbytes
    assert same(pickle.loads(pickled).index, rows.index)


def _index_and_count(path: str, folder: str) -> tuple[str, int]:
    """In a process of its own: the index's digest, and how often this process built it."""
    tempfile.tempdir = folder
    built = []

    def counted(*arguments: Any) -> JsonlIndex:
        built.append(path)
        return build_index(*arguments)

    index_cache.build_index = counted  # type: ignore[assignment]
    return find_or_build_index(path).digest, len(built)


def test_one_of_many_processes_builds(tmp_path: Path, own_folder: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    Path(path).write_text(f"{json.dumps({'text': 'x' * 400})}\n" * 20_000)
    context = get_context("fork")
    with ProcessPoolExecutor(4, context) as pool:
        results = list(pool.map(_index_and_count, [path] * 4, [str(own_folder)] * 4))
    assert {digest for digest, _ in results} == {build_index(path).digest}
    assert sum(count for _, count in results) == 1


def test_changed_file_is_indexed_anew(data_file: str, builds: list[str]) -> None:
    before = find_or_build_index(data_file)
    status = os.stat(data_file)
    with open(data_file, "r+b") as file:
        file.seek(12)
        file.write(b"9")
    os.utime(data_file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying tools do
    after = find_or_build_index(data_file)
    assert after.digest == build_index(data_file).digest != before.digest
    assert len(builds) == 2
    assert len(list(node_folder().glob("*.index"))) == 1, "the old index stays"


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty"])
def test_damaged_index_is_built_anew(data_file: str, builds: list[str], damage: str) -> None:
    find_or_build_index(data_file)
    (place,) = node_folder().glob("*.index")
    content = bytearray(place.read_bytes())
    if damage == "bit":
        content[-9] ^= 4
    elif damage == "header":
        content[20] ^= 0x80
    place.write_bytes(content[: {"cut": -8, "empty": 0}.get(damage, len(content))])
    assert same(find_or_build_index(data_file), build_index(data_file))
    assert len(builds) == 2


@pytest.mark.parametrize("obstacle", ["read-only", "others may write", "a file", "disk full", "full while writing"])
def test_without_a_folder_the_index_is_in_memory(
    data_file: str,
    own_folder: Path,
    obstacle: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    builds: list[str],
) -> None:
    if obstacle == "read-only":
        monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    elif obstacle == "others may write":
        node_folder().mkdir()
        node_folder().chmod(0o777)
    elif obstacle == "a file":
        node_folder().write_text("")
    elif obstacle == "disk full":
        monkeypatch.setattr(index_cache.shutil, "disk_usage", lambda _: _Usage())
    else:
        monkeypatch.setattr(array_files.os, "fsync", _full)
    with caplog.at_level(logging.WARNING):
        index = find_or_build_index(data_file)
    assert same(index, build_index(data_file)) and not isinstance(index, StoredIndex)
    (record,) = caplog.records
    assert "TMPDIR" in record.message and data_file in record.message
    assert builds == [data_file], "it is read more than once"
    assert not list(own_folder.rglob("*.partial*"))


class _Usage:
    free = 0


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_small_files_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert not isinstance(find_or_build_index(str(tmp_path / "rows.jsonl")), StoredIndex)
    assert not node_folder().exists()
