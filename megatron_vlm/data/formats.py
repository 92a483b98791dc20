"""Parse JSONL rows of common formats into one conversation structure.

Accepted rows:
    {"messages": [{"role": ..., "content": "text" or [parts]}, ...]}                       OpenAI style
    {"messages": [... "<image> in the text" ...], "images": [...]}                         images listed beside the text
    {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}     LLaVA / ShareGPT style
`video` or `videos` beside the messages, with "<video>" in the text, likewise.
Image parts: {"type": "image", "image" | "url" | "path" | "base64": X}, {"type": "image_url", "image_url": {"url": X}}.
An image X: a path (relative to the JSONL file, or absolute), a data URI, an http(s) URL, base64 text, {"bytes": ...}.
Video parts: {"type": "video", "video": path of a file or [X, X, ...], "fps": optional}.
Thinking: {"type": "thinking", "thinking": "text"}, or "reasoning_content" beside a message's content.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.errors import DataError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
VIDEO_KEYS = ("video", "url", "path", "video_url")
# Names under which messages have the assistant's reasoning beside their content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# How base64 text of JPEG, PNG, GIF and WebP begins; it sets a bare base64 string apart from a path without disk access.
BASE64_IMAGE_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
SHORTEST_BASE64_IMAGE = 64
LONGEST_PATH_SHOWN = 255


def _shown(path: Path) -> str:
    """Format a path for messages; long text that is no path, such as base64 text of an unknown format, is cut."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH_SHOWN else f"{text[:80]}..."


@dataclass(frozen=True)
class ImageSource:
    """Where one image comes from: exactly one of the three is set."""

    path: Path | None = None
    data: bytes | None = None
    url: str | None = None

    def __str__(self) -> str:
        if self.data is not None:
            return f"an inline image of {len(self.data)} bytes"
        return _shown(self.path) if self.path is not None else str(self.url)


@dataclass(frozen=True)
class TextPart:
    """Text inside a message."""

    text: str


@dataclass(frozen=True)
class ThinkingPart:
    """What the assistant thinks before, or between, what it says."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image inside a message; `source` is None only while a row is being parsed."""

    source: ImageSource | None


@dataclass(frozen=True)
class VideoSource:
    """Where one video comes from: a file, or its frames."""

    path: Path | None = None
    frames: tuple[ImageSource, ...] = ()
    frames_per_second: float | None = None
    """For a list of frames, the rate at which they are shown; for a file, the rate at which frames are sampled."""

    def __str__(self) -> str:
        return _shown(self.path) if self.path is not None else f"of {len(self.frames)} frames"


@dataclass(frozen=True)
class VideoPart:
    """A video inside a message; `source` is None only while a row is being parsed."""

    source: VideoSource | None


Part = TextPart | ThinkingPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """One turn: its role, its content, whether it is trained, and further keys for the chat template (`fields`)."""

    role: str
    content: str | tuple[Part, ...]
    loss: bool = True
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts, also when the row wrote a plain string."""
        return (TextPart(self.content),) if isinstance(self.content, str) else self.content

    @property
    def is_empty_answer(self) -> bool:
        """Whether it is an assistant's and says nothing, so that only its end-of-turn token would be trained."""
        says = any(part.text.strip() for part in self.parts if isinstance(part, TextPart | ThinkingPart))
        return self.role == "assistant" and not says and not self.fields


@dataclass(frozen=True)
class Conversation:
    """One row: its messages in order, and its name ("file.jsonl:17") for error messages."""

    messages: tuple[Message, ...]
    row_name: str

    @property
    def images(self) -> list[ImageSource]:
        """Sources of all images in reading order."""
        return self._sources(ImagePart)

    @property
    def videos(self) -> list[VideoSource]:
        """Sources of all videos in reading order."""
        return self._sources(VideoPart)

    def _sources(self, kind: type[ImagePart] | type[VideoPart]) -> list[Any]:
        parts = [part for message in self.messages for part in message.parts if isinstance(part, kind)]
        return [part.source for part in parts if part.source is not None]

    @property
    def has_thinking(self) -> bool:
        """Whether a message has thinking beside its text."""
        return any(isinstance(part, ThinkingPart) for message in self.messages for part in message.parts)

    @property
    def empty_answers(self) -> int:
        """Number of assistant messages with loss that say nothing."""
        return sum(message.loss and message.is_empty_answer for message in self.messages)

    def first_messages(self, count: int) -> Conversation:
        """Return the conversation up to and including its `count`-th message."""
        return dataclasses.replace(self, messages=self.messages[:count])

    def template_messages(self, images: Sequence[Any], videos: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the messages in the form that chat templates and processors take.

        Args:
            images: one decoded image per image part, in reading order.
            videos: the frames of each video part, in reading order.
        """
        remaining_images, remaining_videos = iter(images), iter(videos)

        def rendered_part(part: Part) -> dict[str, Any]:
            if isinstance(part, TextPart):
                return {"type": "text", "text": part.text}
            if isinstance(part, ThinkingPart):
                return {"type": "thinking", "thinking": part.text}
            if isinstance(part, VideoPart):
                return {"type": "video", "video": next(remaining_videos)}
            return {"type": "image", "image": next(remaining_images)}

        rendered = []
        for message in self.messages:
            content: str | list[dict[str, Any]]
            if isinstance(message.content, str):
                content = message.content
            else:
                content = [rendered_part(part) for part in message.content]
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
        for key in ("audio", "audios"):
            if row.get(key):
                raise self.error(f"the row lists {key}, which is not built yet for this family", "remove the row")
        is_llava = "messages" not in row and "conversations" in row
        turns = row.get("conversations") if is_llava else row.get("messages")
        if not isinstance(turns, list) or not turns:
            raise self.error(
                f"no list of messages; the row's keys are {sorted(row)}", "give `messages` or `conversations`"
            )
        images, videos = self.listed_images(row), self.listed_videos(row)
        # A marker stands for an image or video only where the row says so; elsewhere "<image>" is ordinary text.
        markers: dict[str, Part] = {VIDEO_MARKER: VideoPart(None)} if videos else {}
        if is_llava or images:
            # LLaVA's video rows write "<image>" for a video.
            markers[IMAGE_MARKER] = ImagePart(None) if images or not videos else VideoPart(None)
        messages = [self.message(turn, markers) for turn in turns]
        if isinstance(row.get("system"), str) and messages[0].role != "system":
            messages.insert(0, Message("system", row["system"]))
        messages = self.fill_placeholders(messages, [ImagePart(image) for image in images], "image")
        messages = self.fill_placeholders(messages, [VideoPart(video) for video in videos], "video")
        return Conversation(tuple(messages), self.row_name)

    def error(self, what: str, fix: str | None = None) -> DataError:
        return DataError(what, self.row_name, fix)

    def listed_images(self, row: dict[str, Any]) -> list[ImageSource]:
        """Parse the images that a row lists beside its messages."""
        listed = row.get("images") if row.get("images") is not None else row.get("image")
        if listed is None:
            return []
        return [self.image(item) for item in (listed if isinstance(listed, list) else [listed])]

    def listed_videos(self, row: dict[str, Any]) -> list[VideoSource]:
        """Parse the videos that a row lists beside its messages; a list under `video` is one video's frames."""
        if row.get("videos") is not None:
            listed = row["videos"]
            return [self.video(item) for item in (listed if isinstance(listed, list) else [listed])]
        return [] if row.get("video") is None else [self.video(row["video"])]

    def message(self, turn: Any, markers: Mapping[str, Part]) -> Message:
        if not isinstance(turn, dict):
            raise self.error(f"a message is a JSON {type(turn).__name__}, not an object")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise self.error(f"unknown role {str(role)[:80]!r}", f"roles are {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            raise self.error(f"a message's `loss` is {loss!r}", "give true or false")
        used = {"role", "from", "content", "value", "loss", *REASONING_KEYS}
        fields = {key: value for key, value in turn.items() if key not in used and value is not None}
        return Message(ROLES[role], self.with_reasoning(self.content(content, markers), turn), loss, fields)

    def with_reasoning(self, content: str | tuple[Part, ...], turn: dict[str, Any]) -> str | tuple[Part, ...]:
        """Put reasoning that a message has beside its content before it, as a thinking part."""
        given = [turn[key] for key in REASONING_KEYS if turn.get(key)]
        if not given:
            return content
        if len(given) > 1:
            raise self.error("a message has its reasoning twice", f"keep one of {', '.join(REASONING_KEYS)}")
        said = (TextPart(content),) if isinstance(content, str) else content
        return (ThinkingPart(self.thinking(given[0])), *said)

    def thinking(self, given: Any) -> str:
        """Return the text of a thinking part: a string, or a list of text parts."""
        parts = [{"text": given}] if isinstance(given, str) else given
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise self.error(f"thinking is {str(given)[:80]!r}", "give a string, or a list of text parts")
        return "".join(part["text"] for part in parts)

    def content(self, content: Any, markers: Mapping[str, Part]) -> str | tuple[Part, ...]:
        if isinstance(content, str):
            if not any(marker in content for marker in markers):
                return content
            return tuple(self.split_markers(content, markers))
        if not isinstance(content, list):
            raise self.error(f"a message's content is {content!r}", "give a string or a list of parts")
        parts: list[Part] = []
        for item in content:
            part = self.part(item)
            if isinstance(part, ThinkingPart) and not part.text.strip():
                continue
            parts.extend(self.split_markers(part.text, markers) if markers and isinstance(part, TextPart) else [part])
        return tuple(parts)

    def split_markers(self, text: str, markers: Mapping[str, Part]) -> Iterator[Part]:
        """Split a text at its markers; line breaks beside a marker belong to the marker."""
        pieces = re.split("|".join(f"({re.escape(marker)})" for marker in markers), text)
        has_markers = len(pieces) > 1
        for piece in pieces:
            if piece in markers:
                yield markers[piece]
            elif piece and (words := piece.strip("\n") if has_markers else piece):
                yield TextPart(words)

    def part(self, item: Any) -> Part:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            return TextPart(item["text"])
        if kind == "thinking":
            if item.get("closed", True) is not True:
                raise self.error("a thinking part is not closed, which is not built yet", "remove the row")
            return ThinkingPart(self.thinking(item.get("thinking")))
        if kind in ("image", "image_url"):
            given = [item[key] for key in IMAGE_KEYS if item.get(key) is not None]
            if len(given) > 1:
                raise self.error("an image part names more than one image", f"keep one of {', '.join(IMAGE_KEYS)}")
            if given and item.get("base64") is not None:
                return ImagePart(ImageSource(data=self.decode_base64(given[0])))
            return ImagePart(self.image(given[0]) if given else None)
        if kind in ("video", "video_url"):
            given, rate = self.video_and_rate(item)
            return VideoPart(None if given is None else self.video(given, rate))
        if kind in ("audio", "input_audio"):
            raise self.error(f"a part of type {kind!r} is not built yet for this family", "remove the part or the row")
        kinds = "'text' | 'thinking' | 'image' | 'video'"
        raise self.error(f"not a content part: {str(item)[:80]}", f"give {{'type': {kinds}, ...}}")

    def video_and_rate(self, item: dict[str, Any]) -> tuple[Any, Any]:
        """Return the video and its fps from a part or an object that stands for a video; None for what is missing."""
        given = [item[key] for key in VIDEO_KEYS if item.get(key) is not None]
        if len(given) > 1:
            raise self.error("a video part names more than one video", f"keep one of {', '.join(VIDEO_KEYS)}")
        # Other tools' settings of one video; ignoring them would train on other frames.
        unknown = [key for key in sorted(item) if item[key] is not None and key not in ("type", "fps", *VIDEO_KEYS)]
        if unknown:
            raise self.error(f"a video part also has {', '.join(unknown)}", "keep only the video and `fps`")
        return (given[0] if given else None), item.get("fps")

    def video(self, given: Any, rate: Any = None) -> VideoSource:
        if isinstance(given, dict):
            given, own_rate = self.video_and_rate(given)
            rate = rate if own_rate is None else own_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6):
            raise self.error(f"a video's fps is {rate!r}", "give frames per second, or leave it out")
        if isinstance(given, list):
            if not given:
                raise self.error("a video has no frames", "remove the part or the row")
            return VideoSource(frames=tuple(self.image(frame) for frame in given), frames_per_second=rate)
        if not isinstance(given, str) or not given:
            raise self.error(f"not a video: {str(given)[:80]!r}", "give the path of a file, or a list of frames")
        if given.startswith(("http://", "https://", "data:")):
            raise self.error(f"a video is not a file: {given[:80]!r}", "write it to a file")
        return VideoSource(path=self.directory / given.removeprefix("file://"), frames_per_second=rate)

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

    def fill_placeholders(self, messages: list[Message], listed: Sequence[Part], kind: str) -> list[Message]:
        """Replace placeholders by the row's listed images, or its listed videos, in order."""
        placeholder: Part = ImagePart(None) if kind == "image" else VideoPart(None)
        found = sum(part == placeholder for message in messages for part in message.parts)
        if found != len(listed):
            raise self.error(
                f"{found} {kind} placeholders but {len(listed)} {kind}s",
                "write one placeholder per image or video, in the same order",
            )
        remaining = iter(listed)
        filled = []
        for message in messages:
            if not isinstance(message.content, str):
                parts = [next(remaining) if part == placeholder else part for part in message.content]
                message = dataclasses.replace(message, content=tuple(parts))
            filled.append(message)
        return filled
