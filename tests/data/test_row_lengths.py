"""Files of lengths: what they hold for, what becomes of them when they do not, and rows that are read by them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.data.array_files import node_folder
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.row_lengths import ARRAYS, RowLengths, RowStatus, find_row_lengths, lengths_files
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from tests.data.conftest import measure, read_rows
from tests.data.rows import assistant, image, numbered_rows, row, user

Make = Callable[..., RowReader]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a temporary directory of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def stored(reader: RowReader) -> RowLengths:
    """The lengths of the rows of a reader's only source, measured and kept."""
    (file,) = lengths_files(reader)
    file.store(measure(reader))
    (found,) = find_row_lengths(reader)
    assert file.find() is not None
    return found


def test_stored_lengths_are_mapped_and_not_pickled(make_reader: Make) -> None:
    reader = make_reader(numbered_rows(300))
    found, measured = stored(reader), measure(reader)
    for name, kind in ARRAYS.items():
        array = getattr(found, name)
        assert np.array_equal(array, measured[name]) and array.dtype == kind
        assert not array.flags.owndata and not array.flags.writeable
    assert found.stored_at in Path("/proc/self/maps").read_text()
    pickled = pickle.dumps(found)
    assert len(pickled) < 1000 < found.tokens.nbytes
    assert np.array_equal(pickle.loads(pickled).tokens, found.tokens)
    assert found.count(RowStatus.OK) == 300


@pytest.mark.parametrize(
    ("settings", "is_another"),
    [
        ({}, False),
        ({"strict": True, "max_bad_fraction": 0.5, "num_workers": 7, "shuffle": False}, False),
        ({"too_long": "error"}, False),
        ({"too_long": "truncate"}, True),
        ({"seq_length": 127}, True),
        ({"allow_urls": True}, True),
        ({"drop_empty_answers": True}, True),
        ({"train_thinking": False}, True),
    ],
)
def test_settings_that_change_lengths_have_files_of_their_own(
    make_reader: Make, settings: dict[str, Any], is_another: bool
) -> None:
    rows = numbered_rows(3)
    before, after = (lengths_files(make_reader(rows, **given))[0].place for given in ({}, settings))
    assert (before != after) == is_another


def test_processors_have_files_of_their_own(
    hf_path: Path, rules: PromptRules, qwen_path: Path, qwen_rules: PromptRules, folder: Path, tmp_path: Path
) -> None:
    """By settings, limits, template, tokenizer and the family's rules; rows by what they are and where."""

    def place(path: Path, given: PromptRules, where: Path = folder, count: int = 3, **limits: int) -> Path:
        return lengths_files(read_rows(PromptBuilder(path, given, **limits), where, numbered_rows(count)))[0].place

    def changed(path: Path, name: str, change: Callable[[str], str]) -> Path:
        copied = shutil.copytree(path, tmp_path / f"{path.name} {len(list(tmp_path.iterdir()))}")
        text = (copied / name).read_text()
        (copied / name).write_text(change(text))
        assert (copied / name).read_text() != text
        return copied

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("tmp", "elsewhere"))
    places = [
        place(qwen_path, qwen_rules),
        place(qwen_path, qwen_rules, max_pixels=900),
        place(qwen_path, qwen_rules, min_pixels=90),
        place(qwen_path, qwen_rules, elsewhere),
        place(qwen_path, qwen_rules, count=4),
        place(changed(qwen_path, "chat_template.jinja", lambda text: text + " "), qwen_rules),
        place(changed(qwen_path, "tokenizer.json", lambda text: text + " "), qwen_rules),
        place(changed(qwen_path, "processor_config.json", lambda text: text.replace("1024", "1023")), qwen_rules),
        place(qwen_path, dataclasses.replace(qwen_rules, vocab_size=99_999)),
        place(hf_path, rules),
    ]
    assert len({*places}) == len(places)
    assert place(shutil.copytree(qwen_path, tmp_path / "copy"), qwen_rules) == places[0]


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty", "another"])
def test_files_of_no_use_are_named(make_reader: Make, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    reader = make_reader(numbered_rows(50))
    (file,) = lengths_files(reader)
    assert file.find() is None and not caplog.records
    stored(reader)
    content = bytearray(file.place.read_bytes())
    if damage == "bit":
        content[-9] ^= 4
    elif damage == "header":
        content[20] ^= 0x80
    elif damage == "another":
        content = bytearray(Path(stored(make_reader(numbered_rows(50), seq_length=90)).stored_at).read_bytes())
    file.place.write_bytes(content[: {"cut": -8, "empty": 0}.get(damage, len(content))])
    reader = make_reader(numbered_rows(50))
    assert file.find() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(file.place) in line and "measured anew" in line
    assert damage != "another" or "made for another settings" in line
    with pytest.raises(DataError, match=r"gone from this node.*start again"):
        find_row_lengths(reader)
    stored(reader)


def test_lengths_of_past_contents_go(make_reader: Make) -> None:
    """Those of other settings stay."""
    kept = [stored(make_reader(numbered_rows(5), **given)).stored_at for given in ({}, {"seq_length": 99})]
    assert all(Path(place).is_file() for place in kept)
    after = stored(make_reader(numbered_rows(6))).stored_at
    assert [Path(place).is_file() for place in (*kept, after)] == [False, False, True]


@pytest.mark.parametrize("obstacle", ["read-only", "others may write", "disk full"])
def test_folder_of_no_use(make_reader: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    reader = make_reader(numbered_rows(3))
    measured = measure(reader)
    if obstacle == "read-only":
        monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    elif obstacle == "others may write":
        node_folder().mkdir()
        node_folder().chmod(0o777)
    else:
        monkeypatch.setattr("megatron_vlm.data.array_files.os.fsync", _full)
    reason = r" \(No space left on device\)" if obstacle == "disk full" else ".*"
    with pytest.raises(DataError, match=rf"which data.packing needs, cannot be kept on this node{reason} -- .*TMPDIR"):
        lengths_files(reader)[0].store(measured)
    assert not list(own_folder.rglob("*.partial*"))


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


LONG = row(user(image("0.png"), "one"), assistant("two"), user("three " * 90), assistant("four"))
MEASURED = [
    row(user(image("0.png"), "What?"), assistant("Red.")),
    row(user("words " * 99), assistant("b")),
    LONG,
    row(user(image("nothing.png")), assistant("b")),
    row(user("a"), {"role": "assistant", "content": ""}),
    row(user("a", image("1.png")), assistant("b"), user("c"), {"role": "assistant", "content": ""}),
]


def same(left: Any, right: Any) -> bool:
    plain = ("source", "row_name", "bad", "too_long", "truncated", "problem", "unknown_keys")
    return (
        all(getattr(left, name) == getattr(right, name) for name in plain)
        and np.array_equal(left.sample.input_ids, right.sample.input_ids)
        and np.array_equal(left.sample.trained, right.sample.trained)
        and left.sample.empty_answers == right.sample.empty_answers
        and left.sample.media == right.sample.media
        and all(torch.equal(left.sample.media_inputs[name], value) for name, value in right.sample.media_inputs.items())
    )


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_measured_rows_are_read_as_before(
    builder: PromptBuilder, folder: Path, monkeypatch: pytest.MonkeyPatch, too_long: str
) -> None:
    builder = copy.copy(builder)
    builder.drop_empty_answers = True
    reader = read_rows(builder, folder, MEASURED, too_long=too_long, drop_empty_answers=True)
    lengths = stored(reader)
    cut = RowStatus.TRUNCATED if too_long == "truncate" else RowStatus.TOO_LONG
    assert lengths.status.tolist() == [0, RowStatus.TOO_LONG, cut, RowStatus.BAD, RowStatus.EMPTY, 0]
    for number in range(len(MEASURED)):
        assert same(reader.read_measured(0, number, lengths), reader.read(0, number))
    monkeypatch.setattr("megatron_vlm.data.media_loading.load_image", lambda *_: pytest.fail("an image is decoded"))
    for number in np.flatnonzero(lengths.tokens == 1):
        assert reader.read_measured(0, int(number), lengths).sample.input_ids.shape == (1,)


def test_media_that_change_after_measuring(qwen_builder: PromptBuilder, folder: Path) -> None:
    reader = read_rows(qwen_builder, folder, MEASURED)
    lengths = stored(reader)
    assert lengths.status.tolist()[:4] == [0, RowStatus.TOO_LONG, RowStatus.TOO_LONG, RowStatus.BAD]
    picture, before = (folder / "0.png").read_bytes(), int(lengths.tokens[0])

    def refusal() -> str:
        with pytest.raises(DataError) as raised:
            reader.read_measured(0, 0, lengths)
        assert raised.value.where == f"{folder / 'rows.jsonl'}:1" and lengths.stored_at in str(raised.value)
        return str(raised.value)

    Image.new("RGB", (64, 30)).save(folder / "0.png")
    now = len(reader.read(0, 0).sample.input_ids)
    assert now != before and f"has {now} tokens, and had {before} when lengths were measured" in refusal()
    short = copy.copy(reader)
    short.settings = dataclasses.replace(reader.settings, seq_length=before)
    short_lengths = dataclasses.replace(lengths)
    with pytest.raises(DataError, match=f"has {now} tokens, and had {before}"):
        short.read_measured(0, 0, short_lengths)
    Image.new("RGB", (30, 20)).save(folder / "0.png")
    assert reader.read_measured(0, 0, lengths).sample.media
    (folder / "0.png").write_bytes(picture[:-40])
    assert "image file is truncated" in str(reader.read_measured(0, 0, lengths).problem)
    (folder / "nothing.png").write_bytes(picture)
    found = reader.read_measured(0, 3, lengths)
    assert found.bad and len(found.sample.input_ids) == 1
    assert found.problem and "could not be used when lengths were measured" in found.problem
    assert "on every node, and start again with a new run_dir" in found.problem
