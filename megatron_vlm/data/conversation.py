"""What one row of the data says: its messages, their parts, and where their images, videos and audio come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

LONGEST_PATH_SHOWN = 255


def _shown(path: Path | str | None) -> str:
    """Format a path for messages; long text that is no path, such as base64 text of an unknown format, is cut."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH_SHOWN else f"{text[:80]}..."


@dataclass(frozen=True)
class EncodedSource:
    """Where the bytes of one medium come from: exactly one of the three is set."""

    kind: ClassVar[str]
    path: Path | None = None
    data: bytes | None = None
    url: str | None = None

    def __str__(self) -> str:
        if self.data is not None:
            return f"{self.kind} of {len(self.data)} inline bytes"
        return f"{self.kind} {_shown(self.path if self.path is not None else self.url)}"


@dataclass(frozen=True)
class ImageSource(EncodedSource):
    """Where one image comes from."""

    kind = "image"


@dataclass(frozen=True)
class AudioSource(EncodedSource):
    """Where one clip of audio comes from."""

    kind = "audio"


@dataclass(frozen=True)
class TextPart:
    """Text inside a message."""

    text: str


@dataclass(frozen=True)
class ThinkingPart:
    """What the assistant thinks before, or between, what it says."""

    text: str


@dataclass(frozen=True)
class ImageSize:
    """The size that a row asks of one image: a range of its area, or its sides; all in pixels."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


@dataclass(frozen=True)
class ImagePart:
    """An image inside a message; `source` is None only while a row is being parsed."""

    source: ImageSource | None
    size: ImageSize | None = None


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


@dataclass(frozen=True)
class AudioPart:
    """A clip of audio inside a message; `source` is None only while a row is being parsed."""

    source: AudioSource | None


Part = TextPart | ThinkingPart | ImagePart | VideoPart | AudioPart


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
    unknown_keys: tuple[str, ...] = ()
    """Keys that mean nothing here."""

    @property
    def image_parts(self) -> list[ImagePart]:
        """All images in reading order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImagePart)]

    @property
    def images(self) -> list[ImageSource]:
        """Sources of all images in reading order."""
        return self._sources(ImagePart)

    @property
    def videos(self) -> list[VideoSource]:
        """Sources of all videos in reading order."""
        return self._sources(VideoPart)

    @property
    def audio(self) -> list[AudioSource]:
        """Sources of all clips of audio in reading order."""
        return self._sources(AudioPart)

    def _sources(self, kind: type[ImagePart] | type[VideoPart] | type[AudioPart]) -> list[Any]:
        parts = [part for message in self.messages for part in message.parts if isinstance(part, kind)]
        return [part.source for part in parts if part.source is not None]

    @property
    def characters(self) -> int:
        """Number of characters of all texts."""
        texts = (part for message in self.messages for part in message.parts)
        return sum(len(part.text) for part in texts if isinstance(part, TextPart | ThinkingPart))

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

    def template_messages(
        self, images: Sequence[Any], videos: Sequence[Any] = (), audio: Sequence[Any] = ()
    ) -> list[dict[str, Any]]:
        """Return the messages in the form that chat templates and processors take.

        Args:
            images: one decoded image per image part, in reading order.
            videos: the frames of each video part, in reading order.
            audio: the samples of each audio part, in reading order.
        """
        remaining_images, remaining_videos, remaining_audio = iter(images), iter(videos), iter(audio)

        def rendered_part(part: Part) -> dict[str, Any]:
            if isinstance(part, TextPart):
                return {"type": "text", "text": part.text}
            if isinstance(part, ThinkingPart):
                return {"type": "thinking", "thinking": part.text}
            if isinstance(part, VideoPart):
                return {"type": "video", "video": next(remaining_videos)}
            if isinstance(part, AudioPart):
                return {"type": "audio", "audio": next(remaining_audio)}
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
