"""The keys of rows, messages and parts: those that are read, those that mean something not built, and all others.

Other tools read more keys than this project. A key that would change what is trained must not mean nothing here, so it
makes its row bad; what nobody would miss (an id, a source) is named once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_vlm.data.template_trial import GenerationTag
from megatron_vlm.errors import DataError

LOSS_KEYS = ("loss", "train", "weight", "loss_mask")
# Names under which messages have the assistant's reasoning beside their content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
VIDEO_KEYS = ("video", "url", "path", "video_url")
AUDIO_KEYS = ("audio", "url", "path", "base64", "audio_url", "input_audio")
# Of an object that stands for an image or a clip; only clips have `data`.
SOURCE_KEYS = ("data", "bytes", "url", "path")
MEDIA_KEYS = tuple(dict.fromkeys((*IMAGE_KEYS, *VIDEO_KEYS, *AUDIO_KEYS, "images", "videos", "audios")))
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# Of two spellings; `height` and `weight`, or `image_id` and `image`, are less alike.
RESEMBLANCE = 0.85

_AS_IMAGES = "list its images under `images`"
_AS_VIDEOS = "list its videos under `videos`"
_AS_AUDIO = "list its clips under `audios`"
_IN_THE_ROW = "list it beside the messages, or make it a part of the content"
_NOT_BUILT = "it is not built yet; remove the key or the row"
# Tables of parts begin with this: a key that a part reads comes before what is refused.
_ANOTHER_PART = dict.fromkeys(MEDIA_KEYS, "make the image, video or clip a part of its own, or remove the key")
_OF_MESSAGES = "say it in each message: `loss` is true or false"
_ONE_ANSWER = "preferences are not trained; keep one conversation per row"


@dataclass(frozen=True)
class KeyTable:
    """The keys of one kind of object.

    Attributes:
        owner: what has them, for messages.
        read: keys that are read.
        refused: what to do about keys that mean something which is not built, by key.
        unless_rendered: the same of keys that are fine where the chat template writes them.
    """

    owner: str
    read: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    unless_rendered: Mapping[str, str] = field(default_factory=dict)

    def check(
        self,
        item: Mapping[str, Any],
        error: Callable[[str, str], DataError],
        rendered: frozenset[str] = frozenset(),
    ) -> list[str]:
        """Return the keys of an object that mean nothing.

        Args:
            item: the object.
            error: makes the error to raise from what is wrong and its remedy.
            rendered: keys that the chat template reads.

        Raises:
            DataError: a key would mean something, or its name resembles one that does.
        """
        unknown = []
        for key in item:
            if key in self.read or not is_given(item[key]):
                continue
            if key in self.refused:
                raise error(f"{self.owner} has {key!r}", self.refused[key])
            if key in rendered:
                continue
            if key in self.unless_rendered:
                what = f"{self.owner} has {key!r}, which the chat template does not read"
                raise error(what, self.unless_rendered[key])
            if meant := self._resembling(key):
                refused = {} if meant in self.read else {**self.refused, **self.unless_rendered}
                if meant in refused and meant not in rendered:
                    fix = f"{refused[meant]}; if it means something else, rename the key"
                else:
                    fix = f"if it means {meant!r}, write that; if not, rename the key"
                raise error(f"{self.owner} has {key!r}", fix)
            unknown.append(key)
        return unknown

    def _resembling(self, key: str) -> str | None:
        known = (*self.read, *self.refused, *self.unless_rendered)
        close = difflib.get_close_matches(key.casefold(), known, n=1, cutoff=RESEMBLANCE)
        return close[0] if close else None


ROW = KeyTable(
    "the row",
    ("messages", "conversations", "system", "image", "images", "video", "videos", "audio", "audios"),
    dict.fromkeys(("tools", "functions", "objects", "chat_template_kwargs"), _NOT_BUILT)
    | dict.fromkeys(("image_path", "image_paths", "image_url", "image_urls", "image_file", "img", "imgs"), _AS_IMAGES)
    | dict.fromkeys(("video_path", "video_paths", "video_url", "video_urls", "video_file"), _AS_VIDEOS)
    | dict.fromkeys(("audio_path", "audio_paths", "audio_url", "audio_urls", "audio_file"), _AS_AUDIO)
    | dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"), _ONE_ANSWER)
    | dict.fromkeys((*LOSS_KEYS, "loss_scale"), _OF_MESSAGES)
    | {"system_prompt": "call it `system`"},
)
MESSAGE = KeyTable(
    "a message",
    ("role", "from", "content", "value", *LOSS_KEYS, *REASONING_KEYS),
    dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _IN_THE_ROW)
    | {"loss_scale": "`loss` is true or false"},
    dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), "remove the key or the row"),
)
TEXT_PART = KeyTable(
    "a text part", ("type", "text"), _ANOTHER_PART | dict.fromkeys((*LOSS_KEYS, "loss_scale"), _OF_MESSAGES)
)
THINKING_PART = KeyTable("a thinking part", ("type", "thinking", "closed"), _ANOTHER_PART)
IMAGE_PART = KeyTable(
    "an image part",
    ("type", "index", *IMAGE_KEYS, *SIZE_KEYS),
    _ANOTHER_PART
    | dict.fromkeys(("bytes", "data"), "write {'type': 'image', 'image': {'bytes': ...}}")
    | {"text": "make the text a part of its own", "detail": "say `max_pixels`, or remove the key"},
)
IMAGE = KeyTable(
    "an image",
    ("bytes", "url", "path", *SIZE_KEYS),
    dict.fromkeys(("data", "base64", "image", "image_url"), "give one of `bytes`, `url` and `path`")
    | {"detail": "say `max_pixels`, or remove the key"},
)
# Other tools' settings of one video would train on other frames.
VIDEO_PART = KeyTable(
    "a video part",
    ("type", "index", "fps", *VIDEO_KEYS),
    _ANOTHER_PART
    | dict.fromkeys(
        (*SIZE_KEYS, "total_pixels", "nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end"),
        "keep only the video and `fps`",
    )
    | dict.fromkeys(("bytes", "data", "base64"), "write the video to a file, and give only its `path`")
    | {"text": "make the text a part of its own"},
)
# The same of a clip: what would be heard is another part of the file, or another rate.
_WHOLE_CLIPS = dict.fromkeys(
    ("audio_start", "audio_end", "start", "end", "offset", "duration", "sampling_rate", "sample_rate", "array"),
    "write what is to be heard to a file, which says its rate, and keep only the file",
)
AUDIO_PART = KeyTable(
    "an audio part",
    ("type", "index", *AUDIO_KEYS),
    _ANOTHER_PART
    | _WHOLE_CLIPS
    | dict.fromkeys(("bytes", "data"), "write {'type': 'audio', 'audio': {'bytes': ...}}")
    | {"text": "make the text a part of its own", "format": "the file itself says it; remove the key"},
)
# OpenAI's format says what the file is beside its `data`; decoders look at the data.
AUDIO = KeyTable(
    "a clip of audio",
    ("bytes", "url", "path", "data", "format"),
    _WHOLE_CLIPS
    | dict.fromkeys(("base64", "audio", "audio_url", "input_audio"), "give one of `bytes`, `url`, `path` and `data`"),
)


def is_given(value: Any) -> bool:
    """Whether a key has a value: exports of tables write what is missing as null, as "" or as empty lists."""
    return value is not None and value not in ("", "[]", "{}") and value != [] and value != {}


@cache
def names_in(template: str) -> frozenset[str]:
    """Return the names that a chat template may read from a message: attributes, keys and texts in it."""
    tree = ImmutableSandboxedEnvironment(extensions=[GenerationTag, loopcontrols]).parse(template)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | texts)
