"""JSONL rows in the formats that people have, turned into one conversation structure.

Accepted rows:
    {"messages": [{"role": ..., "content": "text" or [parts]}, ...]}                       OpenAI style
    {"messages": [... "<image> in the text" ...], "images": [...]}                         images listed beside the text
    {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}     LLaVA / ShareGPT style
Image parts: {"type": "image", "image" | "url" | "path" | "base64": X}, {"type": "image_url", "image_url": {"url": X}}.
An image X: a path (relative to the JSONL file, or absolute), a data URI, an http(s) URL, base64 text, {"bytes": ...}.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.errors import DataError

IMAGE_MARKER = "<image>"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
# How base64 text of JPEG, PNG, GIF and WebP begins: tells a bare base64 string from a path without touching the disk.
BASE64_IMAGE_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
SHORTEST_BASE64_IMAGE = 64


@dataclass(frozen=True)
class ImageSource:
    """Where one image comes from: exactly one of the three is set."""

    path: Path | None = None
    data: bytes | None = None
    url: str | None = None

    def __str__(self) -> str:
        if self.data is not None:
            return f"an inline image of {len(self.data)} bytes"
        return str(self.path or self.url)


@dataclass(frozen=True)
class TextPart:
    """Text inside a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image inside a message; `source` is None only while a row is being parsed."""

    source: ImageSource | None


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, what is said, whether it is trained; `fields` are further keys for the chat template."""

    role: str
    content: str | tuple[Part, ...]
    loss: bool = True
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts, also when the row wrote a plain string."""
        return (TextPart(self.content),) if isinstance(self.content, str) else self.content


@dataclass(frozen=True)
class Conversation:
    """One row: its messages in order, and its name ("file.jsonl:17") for error messages."""

    messages: tuple[Message, ...]
    row_name: str

    @property
    def images(self) -> list[ImageSource]:
        """Sources of all images in reading order."""
        return [
            part.source
            for message in self.messages
            for part in message.parts
            if isinstance(part, ImagePart) and part.source is not None
        ]

    @property
    def num_assistant_turns(self) -> int:
        """How many messages the assistant speaks."""
        return sum(message.role == "assistant" for message in self.messages)

    def first_messages(self, count: int) -> Conversation:
        """The conversation up to and including its `count`-th message."""
        return dataclasses.replace(self, messages=self.messages[:count])

    def template_messages(self, images: list[Any]) -> list[dict[str, Any]]:
        """Messages as chat templates and processors take them.

        Args:
            images: one decoded image per image part, in reading order.
        """
        remaining = iter(images)
        rendered = []
        for message in self.messages:
            content: str | list[dict[str, Any]]
            if isinstance(message.content, str):
                content = message.content
            else:
                content = [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image", "image": next(remaining)}
                    for part in message.content
                ]
            rendered.append({**message.fields, "role": message.role, "content": content})
        return rendered


def parse_row(line: bytes | str, row_name: str, directory: Path) -> Conversation:
    """Parse one JSONL line.

    Args:
        line: the line's text.
        row_name: file and line number, for error messages.
        directory: folder of the JSONL file; relative image paths start here.

    Raises:
        DataError: the line is not JSON, has none of the known formats, or its placeholders do not match its images.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the line is not JSON ({error})", row_name, "write one JSON object per line, or remove the line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"the line holds a JSON {type(row).__name__}, not an object", row_name)
    return _RowParser(row_name, directory).parse(row)


class _RowParser:
    """Parses one row; holds what every error message and relative path needs."""

    def __init__(self, row_name: str, directory: Path) -> None:
        self.row_name = row_name
        self.directory = directory

    def parse(self, row: dict[str, Any]) -> Conversation:
        if row.get("tools"):
            raise self.error("the row lists tools, which are not built yet", "remove the key, or the row")
        for key in ("video", "videos", "audio", "audios"):
            if row.get(key):
                raise self.error(f"the row lists {key}, which is not built yet for this family", "remove the row")
        is_llava = "messages" not in row and "conversations" in row
        turns = row.get("conversations") if is_llava else row.get("messages")
        if not isinstance(turns, list) or not turns:
            raise self.error(
                f"no list of messages; the row's keys are {sorted(row)}", "give `messages` or `conversations`"
            )
        listed = self.listed_images(row)
        # A marker stands for an image only where the row says so; elsewhere "<image>" is ordinary text.
        markers = is_llava or bool(listed)
        messages = [self.message(turn, markers) for turn in turns]
        if isinstance(row.get("system"), str) and messages[0].role != "system":
            messages.insert(0, Message("system", row["system"]))
        return Conversation(self.fill_placeholders(messages, listed), self.row_name)

    def error(self, what: str, fix: str | None = None) -> DataError:
        return DataError(what, self.row_name, fix)

    def listed_images(self, row: dict[str, Any]) -> list[ImageSource]:
        """Images that a row lists beside its messages."""
        listed = row.get("images") if row.get("images") is not None else row.get("image")
        if listed is None:
            return []
        return [self.image(item) for item in (listed if isinstance(listed, list) else [listed])]

    def message(self, turn: Any, markers: bool) -> Message:
        if not isinstance(turn, dict):
            raise self.error(f"a message is a JSON {type(turn).__name__}, not an object")
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise self.error(f"unknown role {role!r}", f"roles are {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            raise self.error(f"a message's `loss` is {loss!r}", "give true or false")
        used = {"role", "from", "content", "value", "loss"}
        fields = {key: value for key, value in turn.items() if key not in used and value is not None}
        return Message(ROLES[role], self.content(content, markers), loss, fields)

    def content(self, content: Any, markers: bool) -> str | tuple[Part, ...]:
        if isinstance(content, str):
            return tuple(self.split_markers(content)) if markers and IMAGE_MARKER in content else content
        if not isinstance(content, list):
            raise self.error(f"a message's content is {content!r}", "give a string or a list of parts")
        parts: list[Part] = []
        for item in content:
            part = self.part(item)
            parts.extend(self.split_markers(part.text) if markers and isinstance(part, TextPart) else [part])
        return tuple(parts)

    def split_markers(self, text: str) -> Iterator[Part]:
        """Text and image parts of a text with markers; line breaks beside a marker belong to the marker."""
        for number, piece in enumerate(text.split(IMAGE_MARKER)):
            if number:
                yield ImagePart(None)
            piece = piece.strip("\n") if IMAGE_MARKER in text else piece
            if piece:
                yield TextPart(piece)

    def part(self, item: Any) -> Part:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            return TextPart(item["text"])
        if kind in ("image", "image_url"):
            given = [item[key] for key in IMAGE_KEYS if item.get(key) is not None]
            if len(given) > 1:
                raise self.error("an image part names more than one image", f"keep one of {', '.join(IMAGE_KEYS)}")
            if given and item.get("base64") is not None:
                return ImagePart(ImageSource(data=self.decode_base64(given[0])))
            return ImagePart(self.image(given[0]) if given else None)
        if kind in ("video", "audio", "video_url", "input_audio"):
            raise self.error(f"a part of type {kind!r} is not built yet for this family", "remove the part or the row")
        raise self.error(f"not a content part: {str(item)[:80]}", "give {'type': 'text' | 'image', ...}")

    def image(self, given: Any) -> ImageSource:
        if isinstance(given, dict):
            if given.get("bytes") is not None:
                return ImageSource(data=self.image_bytes(given["bytes"]))
            given = given.get("url") or given.get("path")
        if not isinstance(given, str) or not given:
            raise self.error(f"not an image: {str(given)[:80]!r}", "give a path, a data URI, or {'bytes': base64}")
        if given.startswith("data:"):
            header, comma, body = given.partition(",")
            if not comma or not header.endswith(";base64"):
                raise self.error(f"a data URI is not base64: {given[:40]!r}", "write data:image/png;base64,...")
            return ImageSource(data=self.decode_base64(body))
        if given.startswith(("http://", "https://")):
            return ImageSource(url=given)
        if len(given) >= SHORTEST_BASE64_IMAGE and given.startswith(BASE64_IMAGE_STARTS):
            return ImageSource(data=self.decode_base64(given))
        return ImageSource(path=self.directory / given.removeprefix("file://"))

    def image_bytes(self, given: Any) -> bytes:
        if isinstance(given, list) and all(isinstance(value, int) and 0 <= value < 256 for value in given):
            return bytes(given)
        return self.decode_base64(given)

    def decode_base64(self, text: Any) -> bytes:
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (AttributeError, ValueError, binascii.Error) as error:
            raise self.error(f"an image's bytes are not base64 ({error})") from None

    def fill_placeholders(self, messages: list[Message], listed: list[ImageSource]) -> tuple[Message, ...]:
        """Give the row's listed images to its placeholders, in order."""
        empty = [part for message in messages for part in message.parts if part == ImagePart(None)]
        if len(empty) != len(listed):
            raise self.error(
                f"{len(empty)} image placeholders but {len(listed)} images",
                "write one placeholder per image, in the same order",
            )
        remaining = iter(listed)
        filled = []
        for message in messages:
            if not isinstance(message.content, str):
                parts = [ImagePart(next(remaining)) if part == ImagePart(None) else part for part in message.content]
                message = dataclasses.replace(message, content=tuple(parts))
            filled.append(message)
        return tuple(filled)
