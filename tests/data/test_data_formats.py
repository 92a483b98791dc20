"""Every accepted row format, and one clear refusal for each kind of bad row."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.conversation import Conversation, ImagePart, ImageSource, TextPart
from megatron_vlm.data.formats import parse_row
from megatron_vlm.errors import DataError
from tests.data.rows import assistant, row, text, user

FOLDER = Path("/data/set")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(80)).decode()


def parse(content: Any) -> Conversation:
    line = content if isinstance(content, str) else json.dumps(content)
    return parse_row(line, "rows.jsonl:7", FOLDER)


def sources(part: dict[str, Any]) -> list[ImageSource]:
    return parse(row(user(part), assistant("a"))).images


def test_openai_messages() -> None:
    parsed = parse(row({"role": "system", "content": "Be brief."}, user({"type": "image", "image": "a.png"}, "What?")))
    assert [message.role for message in parsed.messages] == ["system", "user"]
    assert parsed.messages[0].content == "Be brief."
    assert parsed.messages[1].content == (ImagePart(ImageSource(path=FOLDER / "a.png")), TextPart("What?"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a/b.png"},
        {"type": "image", "path": "a/b.png"},
        {"type": "image", "url": "file:///data/set/a/b.png"},
        {"type": "image", "image": "/data/set/a/b.png", "text": None},
        {"type": "image", "image": {"path": "a/b.png", "bytes": None}},
        {"type": "image_url", "image_url": {"url": "a/b.png"}},
        {"type": "image_url", "image_url": "a/b.png"},
    ],
)
def test_image_paths_are_relative_to_the_file(part: dict[str, Any]) -> None:
    assert sources(part) == [ImageSource(path=FOLDER / "a/b.png")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "base64": PNG},
        {"type": "image", "image": PNG},
        {"type": "image", "image": f"data:image/png;base64,{PNG}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image", "image": {"bytes": PNG}},
        {"type": "image", "image": {"bytes": PNG, "path": "a.png"}},
        {"type": "image", "image": {"bytes": list(base64.b64decode(PNG))}},
    ],
)
def test_inline_images(part: dict[str, Any]) -> None:
    assert sources(part) == [ImageSource(data=base64.b64decode(PNG))]


def test_llava_rows() -> None:
    parsed = parse(
        {
            "id": "1",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?\n<image>"},
                {"from": "gpt", "value": "A cat."},
            ],
        }
    )
    first, second = (ImagePart(ImageSource(path=FOLDER / name)) for name in ("a.png", "b.png"))
    assert parsed.messages[0].content == (first, TextPart("What is this?"), second)
    assert (parsed.messages[1].role, parsed.messages[1].content) == ("assistant", "A cat.")


def test_messages_with_images_beside_them() -> None:
    marked = {"messages": [{"role": "user", "content": "<image>What?"}, assistant("a")], "images": ["a.png"]}
    bare = {"messages": [user({"type": "image"}, "What?"), assistant("a")], "images": ["a.png"]}
    for content in (marked, bare):
        parsed = parse(content)
        assert parsed.messages[0].content == (ImagePart(ImageSource(path=FOLDER / "a.png")), TextPart("What?"))


def test_marker_is_plain_text_where_no_image_is_listed() -> None:
    assert parse(row(user("Use the <image> tag."))).messages[0].content == (TextPart("Use the <image> tag."),)


@pytest.mark.parametrize(("written", "role"), [("human", "user"), ("gpt", "assistant"), ("model", "assistant")])
def test_other_names_of_roles(written: str, role: str) -> None:
    assert parse({"conversations": [{"from": written, "value": "a"}]}).messages[0].role == role
    assert parse(row({"role": written, "content": "a"})).messages[0].role == role


def test_system_text_beside_the_turns() -> None:
    parsed = parse({"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}]})
    assert [(message.role, message.content) for message in parsed.messages] == [("system", "Be brief."), ("user", "a")]


def test_loss_flag_and_further_fields() -> None:
    line = json.dumps(row(user("a"), {**assistant("b"), "loss": False, "name": "bot", "weight": None}))
    rendered, not_rendered = (parse_row(line, "row", FOLDER, frozenset(names)) for names in ({"name"}, ()))
    assert rendered.messages[1].loss is False
    assert rendered.template_messages([])[1] == {"role": "assistant", "content": [text("b")], "name": "bot"}
    assert not rendered.unknown_keys
    assert not_rendered.template_messages([])[1] == {"role": "assistant", "content": [text("b")]}
    assert not_rendered.unknown_keys == ("messages.name",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[1, 2]", "JSON list, not an object"),
        ("[" * 100_000, "not JSON"),
        ({"text": "a"}, "no list of messages"),
        ({"messages": []}, "no list of messages"),
        (row({"role": "narrator", "content": "a"}), "unknown role 'narrator'"),
        (row({"role": ["user"], "content": "a"}), "unknown role \"['user']\""),
        ({"conversations": [{"from": {}, "value": "a"}]}, "unknown role '{}'"),
        (row({"role": "user", "content": None}), "content is None"),
        (row({"role": "user", "content": ["a"]}), "not a content part"),
        (row({**assistant("a"), "loss": "no"}), "`loss` is no"),
        (row(user({"type": "image"})), "1 image placeholders but 0 images"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "1 image placeholders but 0 images"),
        (
            {"conversations": [{"from": "human", "value": "<image> <image>"}], "image": "a.png"},
            "2 image placeholders but 1 images",
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}], "image": "a.png"}, "0 image placeholders but 1 images"),
        (row(user({"type": "image", "image": "data:image/png,abc"})), "data URI is not base64"),
        (row(user({"type": "image", "base64": "??"})), "not base64"),
        (row(user({"type": "image", "image": "a", "url": "b"})), "image part has `image` and `url`"),
        (row(user({"type": "image", "image": {"url": "a", "path": "b"}})), "an image has `url` and `path`"),
        (row(user({"type": "image", "image": {"bytes": PNG, "url": "a"}})), "an image has `bytes` and `url`"),
        (row(user({"type": "image", "image": {"path": "a", "base64": PNG}})), "an image has 'base64'"),
        (row(user({"type": "image", "path": "a", "bytes": PNG})), "an image part has 'bytes'"),
        ({**row(user({"type": "image"})), "images": [{"url": "a", "path": "b"}]}, "an image has `url` and `path`"),
        (row(user({"type": "video", "video": [{"url": "a", "path": "b"}]})), "an image has `url` and `path`"),
        (row(user({"type": "video", "video": {"path": "a", "bytes": PNG}})), "a video part has 'bytes'"),
        ({**row(user("a")), "tools": [{"name": "search"}]}, "the row has 'tools'"),
    ],
)
def test_refusals_name_the_row(content: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse(content)
    assert message in str(raised.value)
    assert "[rows.jsonl:7]" in str(raised.value)
    assert "\n" not in str(raised.value)
