"""Indexing of files and the order of rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data import index as index_module
from megatron_vlm.data.index import JsonlRows, build_index
from megatron_vlm.data.plan import PlannedSource, Position, SamplePlan, blend_cycle, blend_shares, permute
from megatron_vlm.data.source_rows import SourceRows
from megatron_vlm.errors import DataError


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 2**20])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_index_finds_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, ending: str, last: bool
) -> None:
    """Rows equal Python's own line reader, wherever the blocks of the scan fall."""
    monkeypatch.setattr(index_module, "BLOCK_BYTES", block_bytes)
    lines = ["", '{"a": 1}', "", "  ", '{"b": "é\\u2028"}', "not json", '{"c": 3}']
    path = tmp_path / "rows.jsonl"
    path.write_bytes((ending.join(lines) + (ending if last else "")).encode())
    rows = JsonlRows(build_index(str(path)))
    expected = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    found = [
        (int(rows.name(row).rpartition(":")[2]), rows.read(row).decode().strip()) for row in range(rows.index.num_rows)
    ]
    assert found == expected
    assert rows.index.unparsable_rows == (2,)


def test_index_notes_a_cut_last_line_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"b": ')
    rows = JsonlRows(build_index(str(path)))
    assert rows.read(0) == b'{"a": 1}'
    assert rows.index.unparsable_rows == (1,)


ELEMENTS: list[Any] = [
    {"a": 1},
    {},
    {"text": 'quotes " and \\ and \\" and [ { ] } , at the end \\'},
    {"nested": [{"b": ["}", "]"]}, []], "é\u2028": "\ud83d\n\t/"},
    {"c": "\\" * 7 + '"'},
]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 2**20])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": True, "separators": (",", ":")}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n"])
def test_elements_of_an_array_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, options: dict[str, Any], mark: bytes
) -> None:
    monkeypatch.setattr(index_module, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "rows.json"
    path.write_bytes(mark + json.dumps(ELEMENTS, **options).encode(errors="surrogatepass") + b"\n")
    rows = JsonlRows(build_index(str(path)))
    assert [json.loads(rows.read(row)) for row in range(rows.index.num_rows)] == ELEMENTS
    assert rows.name(3) == f"{path}[3]" and rows.index.size_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no rows"),
        ('[{"a": 1}', "cut short"),
        ('[{"a": "', "cut short"),
        ('[{"a": 1} {"b": 2}]', "2 elements and 0 commas"),
        ('[{"a": 1},]', "1 elements and 1 commas"),
        ('[{"a": 1}, 3]', "byte 11, '3'"),
        ('["a"]', "byte 1"),
        ("[[1]]", "byte 1, '['"),
        ("[{}] x", "byte 5, 'x'"),
        ("[{}]]", "byte 4, ']'"),
        ("[{}] [{}]", "byte 5, '['"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_what_is_no_array_of_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(index_module, "BLOCK_BYTES", block_bytes)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError) as raised:
        build_index(str(tmp_path / "rows.json"))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1....", "a parquet file, which is not read -- write it as JSONL"),
        (b"\0" * 257 + b"ustar\0", "a tar archive"),
        (b"\x1f\x8b....", "compressed (gzip)"),
        (b"PK\x03\x04", "a ZIP archive"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(DataError) as raised:
        SourceRows(str(tmp_path / "rows"))
    assert message in str(raised.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "folder": "is a directory -- name a file in it, or a pattern such as .*/folder/\\*.jsonl",
        "set": "a Hugging Face data set on disk",
        "pipe": "a broken link, a pipe or a device",
        "no*.jsonl": "no file matches",
    }.items():
        with pytest.raises(DataError, match=message):
            SourceRows(str(tmp_path / name))


def test_files_of_a_pattern_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"b": 1}\nno\n')
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "c.json").write_text('[{"c": 1}]')
    rows = SourceRows(str(tmp_path / "*.json*"))
    assert rows.num_rows == 5 and rows.unparsable_rows == [3]
    assert [
        rows.name(row).rpartition("/")[2] for row in range(5)
    ] == "a.jsonl:1 a.jsonl:3 b.jsonl:1 b.jsonl:2 c.json[0]".split()
    file, row = rows.locate(4)
    assert file.read(row) == b'{"c": 1}'
    digest = rows.digest
    (tmp_path / "b.jsonl").write_text('{"b": 2}\nno\n')
    assert SourceRows(str(tmp_path / "*.json*")).digest != digest
    alone = SourceRows(str(tmp_path / "a.jsonl"))
    assert alone.digest == build_index(str(tmp_path / "a.jsonl")).digest


def test_index_refuses_what_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="has no rows"):
        build_index(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        build_index(str(tmp_path / "nothing.jsonl"))


def test_reading_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    rows = JsonlRows(build_index(str(path)))
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"changed or replaced since it was indexed \[.*rows.jsonl:2\]"):
        rows.read(1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(np.arange(size), size, (7, 0, 0)).tolist()) == list(range(size))


def test_permute_mixes() -> None:
    """Displacement and neighbours look random: the mean of |p(i) - i| is n/3, and few neighbours stay neighbours."""
    size = 20_000
    mixed = permute(np.arange(size), size, (7, 0, 0))
    # The standard error of the mean displacement is 0.24 n / sqrt(n) = 0.0017 n.
    assert abs(np.abs(mixed - np.arange(size)).mean() / size - 1 / 3) < 0.01
    # Two of n on average.
    assert (np.abs(np.diff(mixed)) == 1).sum() < 20
    other = permute(np.arange(size), size, (7, 0, 1))
    # One on average.
    assert (mixed == other).sum() < 10


def test_blend_follows_the_weights_everywhere() -> None:
    shares = blend_shares([0.5, 0.3, 0.2])
    assert shares == [5, 3, 2]
    cycle = np.concatenate([blend_cycle(shares)] * 5)
    for source, share in enumerate(shares):
        given = np.cumsum(cycle == source)
        due = np.arange(1, len(cycle) + 1) * share / 10
        assert np.abs(given - due).max() < 1


def test_blend_of_uneven_weights() -> None:
    shares = blend_shares([0.123456789, 1.0, 1e-9])
    assert shares[2] == 1
    # 1/65536 is the resolution.
    assert abs(shares[0] / sum(shares) - 0.123456789 / 1.123456790) < 2 / 65536


def plan(shuffle: bool = True, seed: int = 3, **changes: object) -> SamplePlan:
    sources = [PlannedSource("a.jsonl", 50, "da", 3.0), PlannedSource("b.jsonl", 7, "db", 1.0)]
    sources[0] = PlannedSource(**{**vars(sources[0]), **changes})
    return SamplePlan(sources, seed, shuffle)


def test_order_is_a_function_of_the_position() -> None:
    whole = plan().rows(0, 500)
    for start, count in ((0, 10), (3, 1), (499, 1), (120, 333)):
        assert plan().rows(start, count) == whole[start : start + count]


def test_every_epoch_has_every_row_once_in_its_own_order() -> None:
    rows = plan().rows(0, 2000)
    for source, size in ((0, 50), (1, 7)):
        orders = [[place.row for place in rows if place.source == source and place.epoch == epoch] for epoch in (0, 1)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert orders[0] != orders[1]
    assert Counter(place.source for place in rows) == {0: 1500, 1: 500}
    assert rows != plan(seed=4).rows(0, 2000)


def test_sources_of_one_size_have_their_own_orders() -> None:
    rows = SamplePlan([PlannedSource(name, 40, name) for name in "ab"], seed=3, shuffle=True).rows(0, 80)
    first, second = ([place.row for place in rows if place.source == source] for source in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_without_shuffle_rows_come_in_file_order() -> None:
    single = SamplePlan([PlannedSource("a.jsonl", 5, "d", 0.7)], seed=3, shuffle=False)
    assert [(place.epoch, place.row) for place in single.rows(3, 9)] == [divmod(n, 5) for n in range(3, 12)]


def test_one_pass_covers_every_row() -> None:
    for shuffle in (False, True):
        positions = plan(shuffle).positions_of_one_pass()
        first = {(place.source, place.row) for place in plan(shuffle).rows(0, positions) if place.epoch == 0}
        assert len(first) == 57
        before = {(place.source, place.row) for place in plan(shuffle).rows(0, positions - 1) if place.epoch == 0}
        assert len(before) == 56


def test_state_round_trip_and_what_changed() -> None:
    state = plan().state(Position(160))
    assert state["consumed_samples"] == 160
    assert plan().check_state(state) == Position(160)
    assert plan(path="elsewhere/a.jsonl").check_state(state) == Position(160)
    for changed, message in (
        (plan(seed=4), "train.seed was 3, now 4"),
        (plan(shuffle=False), "data.shuffle was True, now False"),
        (plan(weight=2.0), "the weight of a.jsonl was 3.0, now 2.0"),
        (plan(num_rows=51), "a.jsonl had 50 rows, now 51"),
        (plan(digest="other"), "the content of a.jsonl changed"),
        (SamplePlan([PlannedSource("a.jsonl", 50, "da")], 3, True), r"the sources were \['a.jsonl', 'b.jsonl'\], now"),
    ):
        with pytest.raises(DataError, match=message):
            changed.check_state(state)
