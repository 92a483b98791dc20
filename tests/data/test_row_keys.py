"""Keys of rows, messages and parts: each is read, or makes its row bad, or is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlm.data import row_keys
from megatron_vlm.data.conversation import Conversation, ImageSize
from megatron_vlm.data.describe import check_rows
from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.media import fit_areas
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader
from megatron_vlm.errors import DataError
from tests.data.rows import assistant, row, user

Make = Callable[..., RowReader]
FOLDER = Path("/data/set")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]


def parse(content: dict[str, Any]) -> Conversation:
    return parse_row(json.dumps(content), "rows.jsonl:7", FOLDER)


def turns(**keys: Any) -> list[dict[str, Any]]:
    """Two exchanges, with further keys on the first answer."""
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad answer", **keys},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "good"},
    ]


@pytest.mark.parametrize("make", ["make_reader", "make_qwen_reader", "make_mistral_reader"])
@pytest.mark.parametrize("key", [{"loss": False}, {"train": False}, {"weight": 0}, {"weight": 0.0}, {"loss_mask": 0}])
def test_answers_that_do_not_train(make: str, key: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """What is trained is what is trained of the second answer where the first is a user's words."""
    reader = request.getfixturevalue(make)([{"messages": turns(**key)}, {"messages": turns()}])
    masked, whole = (reader.read(0, number).sample for number in (0, 1))
    assert masked.input_ids.tolist() == whole.input_ids.tolist()
    first_end = whole.answer_ends[0]
    assert not masked.trained[:first_end].any() and whole.trained[:first_end].any()
    assert masked.trained[first_end:].tolist() == whole.trained[first_end:].tolist()
    assert masked.trained.any()


def test_qwen_trains_four_tokens_of_the_second_answer(make_qwen_reader: Make) -> None:
    """Its letters and the end of the turn."""
    rows = [{"messages": turns(**key)} for key in ({"weight": 0}, {"train": False}, {"loss_mask": 0}, {})]
    reader = make_qwen_reader(rows)
    assert [int(reader.read(0, number).sample.trained.sum()) for number in range(4)] == [4, 4, 4, 11]


@pytest.mark.parametrize(
    "value", [{"weight": 0.5}, {"weight": 2}, {"weight": "0"}, {"loss": "no"}, {"loss_mask": [0, 1]}, {"train": -1}]
)
def test_other_weights_are_bad(value: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"a message's `{next(iter(value))}` is .*give true or false"):
        parse({"messages": turns(**value)})


def test_weights_that_disagree() -> None:
    assert parse({"messages": turns(weight=0, loss=False)}).messages[1].loss is False
    with pytest.raises(DataError, match="`loss` and `weight` disagree"):
        parse({"messages": turns(weight=1, loss=False)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"messages": TURNS, "image_path": "0.png"}, "the row has 'image_path'.*list its images under `images`"),
        ({"messages": TURNS, "Images": ["0.png"]}, "if it means 'images', write that"),
        ({"messages": TURNS, "system": "s", "conversation": []}, None),
        (
            {"messages": TURNS, "audio_files": ["a"]},
            "the row has 'audio_files'.*-- list its clips under `audios`; if it",
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_call": [1]}]}, "'tool_call' .*-- remove the key or the row; if"),
        ({"mesages": TURNS}, "the row has 'mesages'.*'messages'"),
        ({"messages": TURNS, "chosen": "a"}, "preferences are not trained"),
        ({"messages": TURNS, "weight": 0.5}, "say it in each message"),
        ({"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}, "not built yet"),
        ({"messages": TURNS, "conversations": [{"from": "human", "value": "b"}]}, "`messages` and `conversations`"),
        ({"messages": [{"role": "system", "content": "s"}, *TURNS], "system": "t"}, "`system` key and a system"),
        ({"messages": TURNS, "system": ["t"]}, "the row's `system` is"),
        ({"messages": [{"role": "user", "content": "<image>"}], "image": "a", "images": ["b"]}, "`images` and `image`"),
        ({"messages": [{**TURNS[0], "images": ["0.png"]}, TURNS[1]]}, "a message has 'images'"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"id": 1}]}]}, "'tool_calls'.*template does not read"),
        ({"messages": [TURNS[0], {**TURNS[1], "weights": 0}]}, "'weights'.*'weight'"),
        ({"messages": [{**TURNS[0], "from": "human"}]}, "a message has `role` and `from`"),
        (row(user({"type": "text", "text": "a", "loss": False})), "a text part has 'loss'"),
        (row(user({"type": "image", "image": "a", "maxpixels": 4})), "'maxpixels'.*'max_pixels'"),
        (row(user({"type": "image", "image": "a", "text": "b"})), "an image part has 'text'"),
        (row(user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}})), "an image has 'detail'"),
        (row(user({"type": "video", "video": "a", "total_pixels": 4})), "a video part has 'total_pixels'"),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": []}, "1 image placeholders but 0 images"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 image placeholders but 0 images.*is a part"),
    ],
)
def test_keys_that_mean_something(content: dict[str, Any], message: str | None) -> None:
    if message is None:
        parse(content)
        return
    with pytest.raises(DataError, match=message):
        parse(content)


@pytest.mark.parametrize("part", [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "x"}])
def test_media_in_parts_of_words_are_bad(part: dict[str, Any]) -> None:
    for key in row_keys.MEDIA_KEYS:
        with pytest.raises(DataError, match=f"a {part['type']} part has '{key}'.*a part of its own"):
            parse({"messages": [{"role": "user", "content": [{**part, key: "a.wav"}]}]})
        assert not parse({"messages": [{"role": "user", "content": [{**part, key: None}]}]}).unknown_keys


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("other", ["image", "video", "audio", "image_url", "input_audio", "videos"])
def test_other_media_in_parts_of_media_are_bad(kind: str, other: str) -> None:
    if not other.startswith(kind):
        with pytest.raises(DataError, match=f"{kind} part has '{other}'.*a part of its own|has `{kind}` and `{other}`"):
            parse(row(user({"type": kind, kind: "a", other: "b"})))


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
def test_empty_values_mean_absent(empty: Any) -> None:
    plain = parse({"messages": TURNS})
    keys = dict.fromkeys(("images", "image", "videos", "tools", "system", "chosen", "image_path"), empty)
    messages = [{**turn, "tool_calls": empty, "weight": empty, "images": empty} for turn in TURNS]
    assert parse({"messages": messages, "conversations": empty, **keys}) == plain
    llava = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}
    assert parse({**llava, "messages": empty, "image": empty}) == plain


def test_text_that_speaks_of_a_marker_is_a_part() -> None:
    spoken = {"type": "text", "text": "What is <image>?"}
    assert not parse({"messages": [{"role": "user", "content": [spoken]}]}).image_parts


def test_index_chooses_the_image(folder: Path) -> None:
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "image"}, {"type": "image", "index": 1}]
    listed = {"messages": [{"role": "user", "content": parts}], "images": ["0.png", "1.png"]}
    assert [source.path for source in parse(listed).images] == [FOLDER / f"{n}.png" for n in (1, 0, 1)]
    for index, message in ((2, "row lists 2 images"), (-1, "row lists 2 images"), ("1", "row lists"), (True, "lists")):
        with pytest.raises(DataError, match=message):
            parse({**listed, "messages": [{"role": "user", "content": [{"type": "image", "index": index}]}]})
    with pytest.raises(DataError, match="an `index` and its own image"):
        parse(row(user({"type": "image", "image": "a", "index": 0})))
    video = {"messages": [{"role": "user", "content": [{"type": "video", "index": 0}]}], "videos": ["a.mp4"]}
    assert [source.path for source in parse(video).videos] == [FOLDER / "a.mp4"]


@pytest.mark.parametrize(
    ("size", "qwen_tokens"),
    [({}, 16), ({"max_pixels": 64}, 1), ({"resized_height": 8, "resized_width": 8}, 1), ({"max_pixels": 256}, 4)],
)
def test_size_of_one_image(make_qwen_reader: Make, folder: Path, size: dict[str, int], qwen_tokens: int) -> None:
    Image.new("RGB", (32, 32)).save(folder / "big.png")
    part = {"type": "image", "image": "big.png", **size}
    placed = {"messages": [{"role": "user", "content": [{"type": "image", **size}]}, TURNS[1]], "images": ["big.png"]}
    listed = {"messages": [{"role": "user", "content": "<image>"}, TURNS[1]], "images": [{"path": "big.png", **size}]}
    reader = make_qwen_reader([row(user(part, "x"), assistant("y")), placed, listed])
    for number in range(3):
        sample = reader.read(0, number)
        assert not sample.problem
        assert (sample.sample.input_ids == reader.builder.rules.image_token_id).sum() == qwen_tokens


def test_size_that_the_model_cannot_give(make_reader: Make, make_qwen_reader: Make, make_mistral_reader: Make) -> None:
    def problem(make: Make, **size: int) -> str:
        reader = make([row(user({"type": "image", "image": "0.png", **size}), assistant("y"))], max_bad_fraction=1)
        return reader.read(0, 0).problem or ""

    assert "which this model does not choose" in problem(make_reader, max_pixels=64)
    assert "enlarges no image" in problem(make_mistral_reader, min_pixels=64)
    assert "fewer than" in problem(make_mistral_reader, max_pixels=1)
    assert not problem(make_mistral_reader, max_pixels=64)
    assert "the processor would make" in problem(make_mistral_reader, resized_height=4096, resized_width=8)
    assert "the processor would make" in problem(make_qwen_reader, resized_height=4096, resized_width=4096)
    assert "give both or neither" in problem(make_qwen_reader, resized_height=8)
    assert "above its `max_pixels`" in problem(make_qwen_reader, min_pixels=64, max_pixels=8)
    assert "is 0" in problem(make_qwen_reader, max_pixels=0)
    assert "keep one" in problem(make_qwen_reader, resized_height=8, resized_width=8, max_pixels=64)


def test_sizes_are_those_of_the_processor(qwen_builder: PromptBuilder) -> None:
    """Without a request, the size is the one that the processor gives."""
    for sides in ((30, 20), (7, 100), (8, 8), (200, 33)):
        image = Image.new("RGB", sides[::-1])
        (grid,) = qwen_builder.processor.image_processor(image)["image_grid_thw"].tolist()
        patch = qwen_builder.processor.image_processor.patch_size
        token_size = patch * qwen_builder.processor.image_processor.merge_size
        assert fit_areas(qwen_builder.processor, sides, ImageSize(), token_size=token_size) == (
            grid[1] * patch,
            grid[2] * patch,
        )


def test_keys_that_mean_nothing_are_named(make_qwen_reader: Make, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": TURNS, "id": 1}, {"messages": [{**TURNS[0], "mood": "good"}, TURNS[1]], "id": 2}]
    reader = make_qwen_reader(rows)
    assert reader.read(0, 1).unknown_keys == ("id", "messages.mood")
    notes = check_rows(reader).notes
    assert [note.partition(" (")[0] for note in notes] == [
        "the key 'id' means nothing here",
        "the key 'messages.mood' means nothing here",
    ]
    assert "2 rows" in notes[0] and "1 rows" in notes[1]


@pytest.mark.parametrize(
    "table", [table for table in vars(row_keys).values() if isinstance(table, row_keys.KeyTable)], ids=lambda t: t.owner
)
def test_suggested_keys_are_read(table: row_keys.KeyTable) -> None:
    for key in (*table.read, *table.refused, *table.unless_rendered):
        for rendered in (frozenset[str](), frozenset(table.unless_rendered)):
            fixes: list[str] = []

            def error(what: str, fix: str, fixes: list[str] = fixes) -> DataError:
                fixes.append(fix)
                return DataError(what, "row", fix)

            try:
                table.check({f"{key}s": 1}, error, rendered)
            except DataError:
                suggested = re.match("if it means '(.*)', write that", fixes[0])
                assert not suggested or suggested[1] in (*table.read, *rendered)


def test_names_that_a_template_reads() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.tool_calls }}{% endgeneration %}{{ m['name'] }}{% endfor %}"
    assert row_keys.names_in(template) == {"tool_calls", "name"}
    line = json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]})
    answer = parse_row(line, "row", FOLDER, row_keys.names_in(template)).messages[1]
    assert (answer.content, answer.fields, answer.is_empty_answer) == ("", {"tool_calls": [{"id": 1}]}, False)
