"""What happens to rows that are bad or too long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data.describe import check_rows, describe_sample
from megatron_vlm.data.loader import BatchSharding, build_train_loader
from megatron_vlm.data.rows import RowReader, reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError, DataError
from tests.data.rows import assistant, image, numbered_rows, row, user, write_jsonl

GOOD = row(user("a"), assistant("b"))
BAD_ROWS = {
    "not JSON": '{"messages": [',
    "does not exist": row(user(image("nothing.png")), assistant("b")),
    "cannot be decoded": row(user(image("broken.png")), assistant("b")),
    "1 image placeholders but 0 images": {"conversations": [{"from": "human", "value": "<image>"}]},
    "no token of the row is trained": row(user("a")),
    "contains the control token": row(user("<end_of_turn>"), assistant("b")),
    "data.allow_urls": row(user(image("https://localhost/a.png")), assistant("b")),
    "roles must alternate": row(user("a"), user("b"), assistant("c")),
}
Make = Callable[..., RowReader]


@pytest.fixture(autouse=True)
def broken_image(folder: Path) -> None:
    data = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_keep_their_slot(make_reader: Make, reason: str) -> None:
    loaded = make_reader([GOOD, BAD_ROWS[reason], GOOD]).read(0, 1)
    assert loaded.bad and not loaded.too_long
    assert len(loaded.sample.input_ids) == 1 and not loaded.sample.trained.any()
    assert not loaded.sample.media_inputs
    assert loaded.row_name.endswith("rows.jsonl:2")
    assert loaded.problem and reason in loaded.problem and loaded.row_name in loaded.problem


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_strict_refuses_bad_rows(make_reader: Make, reason: str) -> None:
    with pytest.raises(DataError) as raised:
        make_reader([GOOD, BAD_ROWS[reason], GOOD], strict=True).read(0, 1)
    assert reason in str(raised.value) and "rows.jsonl:2]" in str(raised.value)


def test_strict_refuses_lines_that_are_no_objects_before_training(make_reader: Make) -> None:
    with pytest.raises(DataError, match=r"not JSON .*rows.jsonl:3\]"):
        make_reader([GOOD, GOOD, "oops", GOOD], strict=True)


LONG = row(
    user(image("0.png"), "one"),
    assistant("two"),
    user("three"),
    assistant("four"),
    user(image("1.png")),
    assistant("5"),
)


def lengths(make_reader: Make) -> list[int]:
    """Tokens of LONG's first two, four and six messages."""
    reader = make_reader([row(*LONG["messages"][:count]) for count in (2, 4, 6)])
    return [len(reader.read(0, number).sample.input_ids) for number in range(3)]


def test_too_long_rows_are_dropped(make_reader: Make) -> None:
    whole = lengths(make_reader)[2]
    assert not make_reader([LONG], seq_length=whole).read(0, 0).too_long
    loaded = make_reader([LONG], seq_length=whole - 1).read(0, 0)
    assert loaded.too_long and not loaded.bad and not loaded.sample.trained.any()
    assert loaded.problem and f"{whole} tokens, more than data.seq_length {whole - 1}" in loaded.problem


def test_too_long_rows_can_end_the_run(make_reader: Make) -> None:
    """Also when bad rows may pass."""
    reader = make_reader([LONG], seq_length=lengths(make_reader)[2] - 1, too_long="error")
    with pytest.raises(DataError, match=r"more than data.seq_length .*rows.jsonl:1\]"):
        reader.read(0, 0)


def test_truncation_cuts_at_turns(make_reader: Make) -> None:
    """A cut row is the row that ends there; nothing is cut inside a turn or an image."""
    two, four, six = lengths(make_reader)
    for limit, kept in ((six - 1, 4), (four, 4), (four - 1, 2), (two, 2)):
        cut = make_reader([LONG], seq_length=limit, too_long="truncate").read(0, 0)
        whole = make_reader([row(*LONG["messages"][:kept])], seq_length=limit).read(0, 0)
        assert cut.truncated and not cut.too_long
        assert np.array_equal(cut.sample.input_ids, whole.sample.input_ids)
        assert np.array_equal(cut.sample.trained, whole.sample.trained)
        assert cut.sample.count("image") == len(cut.sample.media_inputs["pixel_values"]) == 1
    nothing = make_reader([LONG], seq_length=two - 1, too_long="truncate").read(0, 0)
    assert nothing.too_long and nothing.problem and "no leading turns of it fit" in nothing.problem


def test_truncation_keeps_a_trained_turn(make_reader: Make) -> None:
    messages = [user("a"), {**assistant("b"), "loss": False}, user("c"), assistant("d"), user("e" * 99), assistant("f")]
    four = len(make_reader([row(*messages[:4])]).read(0, 0).sample.input_ids)
    cut = make_reader([row(*messages)], seq_length=four, too_long="truncate").read(0, 0)
    assert cut.truncated and len(cut.sample.input_ids) == four
    assert make_reader([row(*messages)], seq_length=four - 1, too_long="truncate").read(0, 0).too_long


def test_sequences_too_short_for_one_image(make_reader: Make) -> None:
    needed = make_reader([GOOD]).builder.shortest_image_row_tokens
    rows = [GOOD, row(user(image("0.png")), assistant(""))]
    assert not make_reader(rows, seq_length=needed).read(0, 1).too_long
    with pytest.raises(ConfigError, match=f"data.seq_length {needed - 1} is too short .* needs {needed} tokens"):
        make_reader(rows, seq_length=needed - 1)
    # Text alone may be as short as it is.
    assert not make_reader([GOOD], seq_length=needed - 1).read(0, 0).too_long


def test_sequences_too_short_for_a_late_image(make_reader: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlm.data.rows.ROWS_PEEKED_FOR_IMAGES", 1)
    reader = make_reader([GOOD, row(user(image("0.png")), assistant(""))], seq_length=16)
    with pytest.raises(ConfigError, match=r"too short for one image.*rows.jsonl:2\]"):
        reader.read(0, 1)


EMPTY = [
    row({"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}),
    row({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "  \n "}),
    row(user("a"), assistant("b"), user("c"), assistant(" ", "\n")),
    row(user("a"), assistant()),
]
# These are no empty answers: one has a user's empty text, one is not trained.
FULL = [row(user(""), assistant("b")), row(user("a"), {**assistant(""), "loss": False}, user("c"), assistant("d"))]


@pytest.mark.parametrize("drop", [False, True])
def test_empty_answers(
    hf_path: Path,
    rules: PromptRules,
    folder: Path,
    make_config: Callable[..., Config],
    caplog: pytest.LogCaptureFixture,
    drop: bool,
) -> None:
    """They train the end-of-turn token or nothing; they are counted, and the first of each source is named, once."""
    sources = [
        DataSource(write_jsonl(folder / f"{name}.jsonl", rows))
        for name, rows in {"a": EMPTY, "b": FULL + EMPTY}.items()
    ]
    config = make_config(sources, global_batch_size=1, shuffle=False, drop_empty_answers=drop)
    loader = build_train_loader(config, rules, BatchSharding(1, 1), report_problems=True)
    trained = {}
    counters = []
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            batch = next(loader)
            trained[batch.document_names[0].rpartition("/")[2]] = batch.labels[batch.labels >= 0].tolist()
            counters.append(batch.counters["empty_answers"] + batch.counters["bad_rows"])
    end_of_turn = 5
    nothing = [] if drop else [end_of_turn]
    assert trained["a.jsonl:1"] == trained["a.jsonl:2"] == trained["a.jsonl:4"] == nothing
    assert len(trained["a.jsonl:3"]) == (2 if drop else 3) and trained["a.jsonl:3"][1] == end_of_turn
    assert len(trained["b.jsonl:2"]) == 2
    assert sum(counters) == 10  # six of a, of which two come again, and four of b
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and "a.jsonl:1]" in named[0] and "b.jsonl:3]" in named[1]
    assert all(("left out of the loss (data" in line) == drop for line in named)
    reader = reader_for(config, sources, rules)
    check = check_rows(reader)
    assert check.empty_answers == 8 and check.bad_rows == 0 and check.notes == named
    assert "8 empty answers" in str(check)
    assert "1 empty answers" in describe_sample(reader.read(0, 0), reader.builder)


def test_check_of_all_rows(make_reader: Make) -> None:
    rows: list[Any] = [*numbered_rows(20), BAD_ROWS["not JSON"], BAD_ROWS["does not exist"]]
    found = check_rows(make_reader(rows, max_bad_fraction=0.1))
    assert (found.rows, found.images, found.bad_rows) == (22, 8, 2)
    assert "rows.jsonl:21" in found.problems[0] and "rows.jsonl:22" in found.problems[1]
    with pytest.raises(DataError, match="2 of 22 rows are bad"):
        check_rows(make_reader(rows))
    with pytest.raises(DataError, match=r"nothing\.png does not exist"):
        check_rows(make_reader(rows[:-2] + rows[-1:], strict=True))


def test_description_marks_trained_text(make_reader: Make) -> None:
    reader = make_reader([row(user(image("0.png"), "What?"), assistant("Red."))])
    described = describe_sample(reader.read(0, 0), reader.builder)
    assert described.splitlines()[0].endswith("5 trained, 1 images (pixel_values 1x3x16x16))")
    assert "<start_of_image><image_soft_token> x 4 <end_of_image>\n\nWhat?<end_of_turn>\n" in described
    assert "<start_of_turn>model\n[[Red.<end_of_turn>]]" in described
