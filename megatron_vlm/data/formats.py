"""Parse JSONL rows of common formats into one conversation structure.

Accepted rows:
    {"messages": [{"role": ..., "content": "text" or [parts]}, ...]}                       OpenAI style
    {"messages": [... "<image> in the text" ...], "images": [...]}                         images listed beside the text
    {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}     LLaVA / ShareGPT style
`video` or `videos` beside the messages, with "<video>" in the text, likewise, and `audio` or `audios`, with "<audio>".
Image parts: {"type": "image", "image" | "url" | "path" | "base64": X}, {"type": "image_url", "image_url": {"url": X}},
{"type": "image", "index": 0} for one that the row lists; with "min_pixels", "max_pixels", "resized_height" and
"resized_width" for this image.
An image or clip X: a path (relative to the JSONL file, or absolute), a data URI, an http(s) URL, base64 text, or
{"bytes": ...}.
Video parts: {"type": "video", "video": path of a file or [X, X, ...], "fps": optional}.
Audio parts: {"type": "audio", "audio" | "url" | "path" | "base64": X}, {"type": "audio_url", "audio_url": {"url": X}},
{"type": "input_audio", "input_audio": {"data": base64, "format": ...}}, {"type": "audio", "index": 0}.
Thinking: {"type": "thinking", "thinking": "text"}, or "reasoning_content" beside a message's content.
Messages with "loss" or "train" false, or "weight" or "loss_mask" 0, are not trained.
What keys mean, and which make a row bad: `row_keys`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data import row_keys
from megatron_vlm.data.conversation import (
    AudioPart,
    AudioSource,
    Conversation,
    EncodedSource,
    ImagePart,
    ImageSize,
    ImageSource,
    Message,
    Part,
    TextPart,
    ThinkingPart,
    VideoPart,
    VideoSource,
)
from megatron_vlm.data.row_keys import (
    AUDIO_KEYS,
    IMAGE_KEYS,
    LOSS_KEYS,
    REASONING_KEYS,
    SIZE_KEYS,
    SOURCE_KEYS,
    VIDEO_KEYS,
    is_given,
)
from megatron_vlm.errors import DataError

IMAGE_MARKER, VIDEO_MARKER, AUDIO_MARKER = "<image>", "<video>", "<audio>"
PLACEHOLDERS: dict[str, type[ImagePart] | type[VideoPart] | type[AudioPart]] = {
    "image": ImagePart,
    "video": VideoPart,
    "audio": AudioPart,
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
# How base64 text of JPEG, PNG, GIF and WebP begins, and of WAV, FLAC, Ogg and most MP3 files; it sets a bare base64
# string apart from a path without disk access.
BASE64_STARTS = {
    ImageSource: ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR"),
    AudioSource: ("UklGR", "ZkxhQ", "T2dnU", "SUQz"),
}
SHORTEST_BASE64 = 64
LONGEST_KEY_SHOWN = 60
MOST_PIXELS_ASKED = 2**31 - 1


def parse_row(
    line: bytes | str, row_name: str, directory: Path, rendered: frozenset[str] = frozenset()
) -> Conversation:
    """Parse one JSONL line.

    Args:
        line: the line's text.
        row_name: file and line number, for error messages.
        directory: folder of the JSONL file; relative paths start here.
        rendered: keys of messages that the chat template reads.

    Raises:
        DataError: the line is not JSON, has none of the known formats, or keys that would mean something, or its
            placeholders do not match its images, videos and audio.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the line is not JSON ({error})", row_name, "write one JSON object per line, or remove the line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"the line holds a JSON {type(row).__name__}, not an object", row_name)
    return _RowParser(row_name, directory, rendered).parse(row)


class _RowParser:
    """Parses one row; holds what every error message and relative path needs."""

    def __init__(self, row_name: str, directory: Path, rendered: frozenset[str]) -> None:
        self.row_name, self.directory, self.rendered = row_name, directory, rendered
        self.unknown_keys: dict[str, None] = {}
        self.listed: dict[str, Sequence[Part]] = {}
        self.chosen: dict[str, set[int]] = {kind: set() for kind in PLACEHOLDERS}
        """What the row lists beside its messages, by kind, and which of it parts chose by `index`."""
        self.lists_media = False

    def parse(self, row: dict[str, Any]) -> Conversation:
        self.check_keys(row_keys.ROW, row, "")
        is_llava = is_given(row.get("conversations"))
        if is_llava and is_given(row.get("messages")):
            raise self.error("the row has `messages` and `conversations`", "keep one of them")
        turns = row.get("conversations" if is_llava else "messages")
        if not isinstance(turns, list) or not turns:
            raise self.error(
                f"no list of messages; the row's keys are {sorted(row)}", "give `messages` or `conversations`"
            )
        self.lists_media = any(key in row for key in ("image", "images", "video", "videos", "audio", "audios"))
        self.listed = {
            "image": self.listed_images(row),
            "video": self.listed_videos(row),
            "audio": self.listed_audio(row),
        }
        markers = self.markers(row, is_llava)
        messages = [self.message(turn, markers) for turn in turns]
        if is_given(row.get("system")):
            self.add_system(messages, row["system"])
        for kind, listed in self.listed.items():
            left = [part for number, part in enumerate(listed) if number not in self.chosen[kind]]
            messages = self.fill_placeholders(messages, left, kind)
        return Conversation(tuple(messages), self.row_name, tuple(self.unknown_keys))

    def markers(self, row: dict[str, Any], is_llava: bool) -> dict[str, Part]:
        """Return what markers stand for in texts; in LLaVA's video rows, "<image>" is a video."""
        only_videos = is_llava and self.listed["video"] and not self.listed["image"]
        return {
            IMAGE_MARKER: VideoPart(None) if only_videos else ImagePart(None),
            VIDEO_MARKER: VideoPart(None),
            AUDIO_MARKER: AudioPart(None),
        }

    def add_system(self, messages: list[Message], system: Any) -> None:
        if not isinstance(system, str):
            raise self.error(f"the row's `system` is {str(system)[:80]!r}", "give a string")
        if any(message.role == "system" for message in messages):
            raise self.error("the row has a `system` key and a system message", "keep one of them")
        messages.insert(0, Message("system", system))

    def check_keys(self, table: row_keys.KeyTable, item: dict[str, Any], prefix: str) -> None:
        rendered = self.rendered if table is row_keys.MESSAGE else frozenset()
        for key in table.check(item, self.error, rendered):
            self.unknown_keys[f"{prefix}{key}"[:LONGEST_KEY_SHOWN]] = None

    def error(self, what: str, fix: str | None = None) -> DataError:
        return DataError(what, self.row_name, fix)

    def listed_images(self, row: dict[str, Any]) -> list[ImagePart]:
        """Parse the images that a row lists beside its messages."""
        key = self.only_key(row, ("images", "image"), "the row")
        listed = [] if key is None else row[key]
        return [self.image_part(item) for item in (listed if isinstance(listed, list) else [listed])]

    def listed_videos(self, row: dict[str, Any]) -> list[VideoPart]:
        """Parse the videos that a row lists beside its messages; a list under `video` is one video's frames."""
        key = self.only_key(row, ("videos", "video"), "the row")
        listed = [] if key is None else row[key]
        items = listed if key != "video" and isinstance(listed, list) else [listed]
        return [VideoPart(self.video(item)) for item in items]

    def listed_audio(self, row: dict[str, Any]) -> list[AudioPart]:
        """Parse the clips of audio that a row lists beside its messages."""
        key = self.only_key(row, ("audios", "audio"), "the row")
        listed = [] if key is None else row[key]
        return [AudioPart(self.clip(item)) for item in (listed if isinstance(listed, list) else [listed])]

    def only_key(self, item: dict[str, Any], keys: Sequence[str], owner: str) -> str | None:
        """Return the key of these that is given, None without any."""
        given = [key for key in keys if is_given(item.get(key))]
        if len(given) > 1:
            raise self.error(f"{owner} has {' and '.join(f'`{key}`' for key in given)}", "keep one of them")
        return given[0] if given else None

    def message(self, turn: Any, markers: Mapping[str, Part]) -> Message:
        if not isinstance(turn, dict):
            raise self.error(f"a message is a JSON {type(turn).__name__}, not an object")
        self.check_keys(row_keys.MESSAGE, turn, "messages.")
        role = turn.get(self.only_key(turn, ("role", "from"), "a message") or "role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise self.error(f"unknown role {str(role)[:80]!r}", f"roles are {', '.join(ROLES)}")
        content = turn.get(self.only_key(turn, ("content", "value"), "a message") or "content", turn.get("value"))
        fields = {
            key: value
            for key, value in turn.items()
            if key in self.rendered and key not in row_keys.MESSAGE.read and is_given(value)
        }
        if content is None and fields:
            content = ""  # a call of a tool needs no words
        return Message(
            ROLES[role], self.with_reasoning(self.content(content, markers), turn), self.is_trained(turn), fields
        )

    def is_trained(self, turn: dict[str, Any]) -> bool:
        given = {key: turn[key] for key in LOSS_KEYS if is_given(turn.get(key))}
        for key, value in given.items():
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise self.error(f"a message's `{key}` is {str(value)[:80]}", "give true or false")
        if len({bool(value) for value in given.values()}) > 1:
            raise self.error(f"a message's {' and '.join(f'`{key}`' for key in given)} disagree", "keep one of them")
        return all(given.values())

    def with_reasoning(self, content: str | tuple[Part, ...], turn: dict[str, Any]) -> str | tuple[Part, ...]:
        """Put reasoning that a message has beside its content before it, as a thinking part."""
        key = self.only_key(turn, REASONING_KEYS, "a message")
        if key is None:
            return content
        said = (TextPart(content),) if isinstance(content, str) else content
        return (ThinkingPart(self.thinking(turn[key])), *said)

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
            if isinstance(part, TextPart) and self.lists_media:  # elsewhere images are parts, and this is only text
                parts.extend(self.split_markers(part.text, markers))
            else:
                parts.append(part)
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
            self.check_keys(row_keys.TEXT_PART, item, "parts.")
            return TextPart(item["text"])
        if kind == "thinking":
            self.check_keys(row_keys.THINKING_PART, item, "parts.")
            if item.get("closed", True) is not True:
                raise self.error("a thinking part is not closed, which is not built yet", "remove the row")
            return ThinkingPart(self.thinking(item.get("thinking")))
        if kind in ("image", "image_url"):
            return self.image_part_of_message(item)
        if kind in ("video", "video_url"):
            given, rate = self.video_and_rate(item)
            chosen = self.chosen_by_index(item, given, "video")
            return chosen or VideoPart(None if given is None else self.video(given, rate))
        if kind in ("audio", "audio_url", "input_audio"):
            return self.audio_part_of_message(item)
        kinds = "'text' | 'thinking' | 'image' | 'video' | 'audio'"
        raise self.error(f"not a content part: {str(item)[:80]}", f"give {{'type': {kinds}, ...}}")

    def image_part_of_message(self, item: dict[str, Any]) -> ImagePart:
        self.check_keys(row_keys.IMAGE_PART, _without_auto_detail(item), "parts.")
        key, size = self.only_key(item, IMAGE_KEYS, "an image part"), self.image_size(item)
        chosen = self.chosen_by_index(item, key, "image")
        if isinstance(chosen, ImagePart):
            return self.with_size(chosen, size)
        if key is None:
            return ImagePart(None, size)
        if key == "base64":
            return ImagePart(ImageSource(data=self.decode_base64(item[key])), size)
        return self.with_size(self.image_part(item[key]), size)

    def audio_part_of_message(self, item: dict[str, Any]) -> Part:
        self.check_keys(row_keys.AUDIO_PART, item, "parts.")
        key = self.only_key(item, AUDIO_KEYS, "an audio part")
        if chosen := self.chosen_by_index(item, key, "audio"):
            return chosen
        if key is None:
            return AudioPart(None)
        if key == "base64":
            return AudioPart(AudioSource(data=self.decode_base64(item[key])))
        return AudioPart(self.clip(item[key]))

    def with_size(self, part: ImagePart, size: ImageSize | None) -> ImagePart:
        if part.size is not None and size is not None and part.size != size:
            raise self.error("an image has two sizes", "keep one of them")
        return dataclasses.replace(part, size=size or part.size)

    def chosen_by_index(self, item: dict[str, Any], given: Any, kind: str) -> Part | None:
        """Return what a part chooses of the row's images, videos or clips of audio, if it does that."""
        index, listed = item.get("index"), self.listed[kind]
        if not is_given(index):
            return None
        if given is not None:
            raise self.error(f"a part has an `index` and its own {kind}", "keep one of them")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(listed):
            raise self.error(
                f"a part has the `index` {str(index)[:80]}, but the row lists {len(listed)} {kind}s",
                "count them from 0",
            )
        self.chosen[kind].add(index)
        return listed[index]

    def image_size(self, item: dict[str, Any]) -> ImageSize | None:
        given = {key: item[key] for key in SIZE_KEYS if is_given(item.get(key))}
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_PIXELS_ASKED:
                raise self.error(f"an image's `{key}` is {str(value)[:80]}", "give a number of pixels")
        size = ImageSize(**given)
        if (size.resized_height is None) != (size.resized_width is None):
            raise self.error("an image has one of `resized_height` and `resized_width`", "give both or neither")
        if size.resized_height is not None and (size.min_pixels is not None or size.max_pixels is not None):
            raise self.error("an image has sides (`resized_height`) and limits of its area (`max_pixels`)", "keep one")
        if size.min_pixels is not None and size.max_pixels is not None and size.min_pixels > size.max_pixels:
            raise self.error(f"an image's `min_pixels` is {size.min_pixels}, above its `max_pixels`", "lower it")
        return size if given else None

    def video_and_rate(self, item: dict[str, Any]) -> tuple[Any, Any]:
        """Return the video and its fps from a part or an object that stands for a video; None for what is missing."""
        self.check_keys(row_keys.VIDEO_PART, item, "parts.")
        key = self.only_key(item, VIDEO_KEYS, "a video part")
        return (None if key is None else item[key]), item.get("fps")

    def video(self, given: Any, rate: Any = None) -> VideoSource:
        if isinstance(given, dict):
            given, own_rate = self.video_and_rate(given)
            rate = rate if own_rate is None else own_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6):
            raise self.error(f"a video's fps is {rate!r}", "give frames per second, or leave it out")
        if isinstance(given, list):
            if not given:
                raise self.error("a video has no frames", "remove the part or the row")
            return VideoSource(frames=tuple(self.frame(frame) for frame in given), frames_per_second=rate)
        if not isinstance(given, str) or not given:
            raise self.error(f"not a video: {str(given)[:80]!r}", "give the path of a file, or a list of frames")
        if given.startswith(("http://", "https://", "data:")):
            raise self.error(f"a video is not a file: {given[:80]!r}", "write it to a file")
        return VideoSource(path=self.directory / given.removeprefix("file://"), frames_per_second=rate)

    def image_part(self, given: Any) -> ImagePart:
        """Parse an image with the size that an object beside its place may ask for."""
        return ImagePart(self.image(given), self.image_size(given) if isinstance(given, dict) else None)

    def frame(self, given: Any) -> ImageSource:
        if isinstance(given, dict) and self.image_size(given) is not None:
            raise self.error("a frame of a video asks for a size", "keep only its path or bytes")
        return self.image(given)

    def image(self, given: Any) -> ImageSource:
        if isinstance(given, dict):
            self.check_keys(row_keys.IMAGE, _without_auto_detail(given), "images.")
        return self.encoded(given, ImageSource)

    def clip(self, given: Any) -> AudioSource:
        """Parse a clip of audio."""
        if isinstance(given, dict):
            self.check_keys(row_keys.AUDIO, given, "audios.")
            if self.only_source(given, AudioSource) == "data":
                data = given["data"]
                is_address = isinstance(data, str) and data.startswith(("data:", "http://", "https://"))
                given = data if is_address else {"bytes": data}
        return self.encoded(given, AudioSource)

    def encoded[Source: EncodedSource](self, given: Any, kind: type[Source]) -> Source:
        """Parse what stands for an image or a clip of audio: a path, a URL, bytes, or an object with one of them."""
        if isinstance(given, dict):
            key = self.only_source(given, kind)
            if key == "bytes":
                return kind(data=self.inline_bytes(given[key]))
            given = None if key is None else given[key]
        if not isinstance(given, str) or not given:
            what = {"image": "an image", "audio": "audio"}[kind.kind]
            raise self.error(f"not {what}: {str(given)[:80]!r}", "give a path, a data URI, or {'bytes': base64}")
        if given.startswith("data:"):
            header, comma, body = given.partition(",")
            if not comma or not header.endswith(";base64"):
                example = {"image": "image/png", "audio": "audio/wav"}[kind.kind]
                raise self.error(f"a data URI is not base64: {given[:40]!r}", f"write data:{example};base64,...")
            return kind(data=self.decode_base64(body))
        if given.startswith(("http://", "https://")):
            return kind(url=given)
        if len(given) >= SHORTEST_BASE64 and given.startswith(BASE64_STARTS[kind]):
            return kind(data=self.decode_base64(given))
        return kind(path=self.directory / given.removeprefix("file://"))

    def only_source(self, given: dict[str, Any], kind: type[EncodedSource]) -> str | None:
        """Return the key under which an object has its image or clip; beside `bytes`, `path` is only its name."""
        keys = SOURCE_KEYS[:-1] if is_given(given.get("bytes")) else SOURCE_KEYS
        return self.only_key(given, keys, {"image": "an image", "audio": "a clip of audio"}[kind.kind])

    def inline_bytes(self, given: Any) -> bytes:
        if isinstance(given, list) and all(isinstance(value, int) and 0 <= value < 256 for value in given):
            return bytes(given)
        return self.decode_base64(given)

    def decode_base64(self, text: Any) -> bytes:
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (AttributeError, ValueError, binascii.Error) as error:
            raise self.error(f"the bytes of an image or of audio are not base64 ({error})") from None

    def fill_placeholders(self, messages: list[Message], listed: Sequence[Part], kind: str) -> list[Message]:
        """Replace placeholders of one kind by what the row lists of that kind, in order."""

        def is_placeholder(part: Part) -> bool:
            return isinstance(part, PLACEHOLDERS[kind]) and part.source is None

        found = sum(is_placeholder(part) for message in messages for part in message.parts)
        if found != len(listed):
            raise self.error(
                f"{found} {kind} placeholders but {len(listed)} {kind}s",
                "write one placeholder per image, video or clip, in the same order; a text that only speaks of "
                f"<{kind}> is a part: {{'type': 'text', 'text': ...}}",
            )
        remaining = iter(listed)
        filled = []
        for message in messages:
            if not isinstance(message.content, str):
                parts = (self.filled(part, remaining) if is_placeholder(part) else part for part in message.content)
                message = dataclasses.replace(message, content=tuple(parts))
            filled.append(message)
        return filled

    def filled(self, placeholder: Part, remaining: Iterator[Part]) -> Part:
        listed = next(remaining)
        if isinstance(placeholder, ImagePart) and isinstance(listed, ImagePart):
            return self.with_size(listed, placeholder.size)
        return listed


def _without_auto_detail(item: dict[str, Any]) -> dict[str, Any]:
    """Leave out what OpenAI's format says where the size of an image is left to the model."""
    return {key: value for key, value in item.items() if (key, value) != ("detail", "auto")}
