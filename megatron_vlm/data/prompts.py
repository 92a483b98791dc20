"""Encode conversations as token ids, trained-token masks and media with the model's processor and chat template.

Ids and pixels are what `processor.apply_chat_template(messages, tokenize=True)` gives; nothing is added, cut or padded,
whatever arguments of calls the tokenizer's files store. Which tokens are trained is decided in this order:
1. The template has generation tags: what stands between them, as in transformers' own `assistant_masks`.
2. The family's turn markers around the assistant's texts (`answers.py`). A control token inside a message could forge a
   turn, so such a row is refused, and so is one in which the start or the end of an answer cannot be determined.
3. Otherwise the model directory is refused.
Placeholders of media are never trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from megatron_vlm.data.answers import (
    REASONING_FIELD,
    Span,
    check_thinking,
    find_answers,
    find_marks,
    find_thinking,
    mark_messages,
    match_tagged_answers,
    tokens_of_spans,
)
from megatron_vlm.data.conversation import (
    Conversation,
    ImagePart,
    ImageSize,
    ImageSource,
    Message,
    TextPart,
    ThinkingPart,
)
from megatron_vlm.data.media import Medium, Sides
from megatron_vlm.data.processor import (
    MEDIA_TOKEN_NAMES,
    check_added_tokens,
    drop_stored_arguments,
    load_processor,
)
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.template_limits import MOST_ADDED_CHARACTERS, limit_rendering, try_template
from megatron_vlm.data.videos import Video
from megatron_vlm.errors import ConfigError, DataError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

# What templates and processors raise on a conversation they do not accept.
REFUSALS = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)
MOST_WORDS_OF_A_REFUSAL = 300
PROBE = "a thought of the probe"


@dataclass
class Sample:
    """One row of the data as the model sees it: a document of S tokens with its media."""

    input_ids: np.ndarray
    """[S] int64."""
    trained: np.ndarray
    """[S] bool: the token at this position is a target."""
    media: list[Medium] = field(default_factory=list)
    """Its images and videos in reading order, then its clips of audio."""
    media_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Inputs of the towers for all media in reading order, by name; see `media.Packed`. Empty without media."""
    answer_ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Position after the last token of each answer, int64; with generation tags, of each text between them."""
    empty_answers: int = 0
    """Answers that say nothing: their end-of-turn token is trained, or dropped."""

    def count(self, kind: str) -> int:
        """Return how many media are of a kind."""
        return sum(medium.kind == kind for medium in self.media)


class PromptBuilder:
    """The processor and chat template of one model directory.

    Args:
        hf_path: directory with tokenizer, processor and chat template files.
        rules: the family's prompt rules.
        min_pixels: fewest pixels of an image, or of all frames of a video together; None keeps the processor's own
            values.
        max_pixels: most pixels, likewise.
        train_thinking: whether the thinking in answers is trained.
        drop_empty_answers: whether answers that say nothing are left out of the loss.

    Raises:
        ConfigError: the directory cannot be loaded, has no chat template, or does not fit the model or the options.
    """

    def __init__(
        self,
        hf_path: str | Path,
        rules: PromptRules,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        train_thinking: bool = True,
        drop_empty_answers: bool = False,
    ) -> None:
        self.rules = rules
        self.train_thinking = train_thinking
        self.drop_empty_answers = drop_empty_answers
        self.hf_path = str(hf_path)
        self.processor = load_processor(self.hf_path, rules, min_pixels, max_pixels)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.notes: list[str] = []
        """What the start should say about the directory, one line each."""
        if ignored := drop_stored_arguments(self.processor):
            self.notes.append(f"ignored settings in the tokenizer's files of {hf_path}: {', '.join(ignored)}")
        if note := check_added_tokens(self.tokenizer, rules, self.hf_path):
            self.notes.append(note)
        template = self.processor.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        self.template: str = template or ""
        if not template:
            raise ConfigError(f"{hf_path} has no chat template", "model.hf_path", "add a chat_template.jinja file")
        try_template(template, self.hf_path)
        self.has_generation_tags = bool(GENERATION_TAG.search(template))
        if not self.has_generation_tags and rules.assistant_start not in self._probe_prompt():
            raise ConfigError(
                f"the chat template of {hf_path} does not mark the assistant's turns with {rules.assistant_start!r}",
                "model.hf_path",
                "put {% generation %} ... {% endgeneration %} around the assistant's text in the template",
            )
        named = [getattr(owner, name, None) for owner in (self.tokenizer, self.processor) for name in MEDIA_TOKEN_NAMES]
        media_tokens = {token for token in (*named, *rules.media_tokens) if token}
        self._forging_token = _any_of(
            media_tokens if self.has_generation_tags else media_tokens | _turn_tokens(self.tokenizer, rules)
        )

    def encode(
        self,
        conversation: Conversation,
        images: Sequence[Image.Image],
        videos: Sequence[Video] = (),
        audio: Sequence[np.ndarray] = (),
    ) -> Sample:
        """Encode one conversation as tokens, trained mask and media.

        Args:
            conversation: the row.
            images: its decoded images in reading order.
            videos: its decoded videos in reading order.
            audio: samples [samples] of its clips of audio in reading order, at the rate of `audio_limits`.

        Raises:
            DataError: the row cannot be rendered, has a control token in its text, or trains nothing; a row that would
                train nothing but dropped empty answers is returned as it is.
        """
        assert not images or self.rules.image_token_id is not None
        assert not videos or self.rules.video_token_id is not None
        assert not audio or self.rules.audio_token_id is not None
        self._refuse_control_tokens(conversation)
        messages = self._messages(conversation, images, videos, audio)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        losses = [message.loss and not (self.drop_empty_answers and message.is_empty_answer) for message in answers]
        try:
            with limit_rendering(self.template):
                spans, untrained = self._find_spans(messages, conversation, all(losses))
                output = self._apply_template(messages, videos)
        except REFUSALS as error:
            reason = str(error)[:MOST_WORDS_OF_A_REFUSAL] or type(error).__name__
            raise DataError(
                f"the chat template or processor refuses the row: {reason}",
                conversation.row_name,
                "correct or remove the row",
            ) from None
        input_ids = np.array(output["input_ids"], np.int64)
        self._refuse_ids_without_rows(input_ids, conversation.row_name)
        trained, answer_ends = self._mask(input_ids, output, spans, untrained, losses)
        empty_answers = conversation.empty_answers
        if not trained.any() and not (self.drop_empty_answers and empty_answers):
            raise DataError("no token of the row is trained", conversation.row_name, "add an assistant message")
        if self.rules.media is None:
            return Sample(input_ids, trained, answer_ends=answer_ends, empty_answers=empty_answers)
        given = output if images or videos or audio else {}
        media_inputs, media = self.rules.media.pack(given, input_ids, conversation.row_name)
        return Sample(input_ids, trained, media, media_inputs, answer_ends, empty_answers)

    def transformers_inputs(
        self,
        conversation: Conversation,
        images: Sequence[Image.Image],
        videos: Sequence[Video] = (),
        audio: Sequence[np.ndarray] = (),
    ) -> dict[str, Any]:
        """Return the processor's output as transformers' model takes it; arguments are those of `encode`."""
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        if videos:
            options["processor_kwargs"] = _of_videos(videos)
        return dict(self.processor.apply_chat_template(self._messages(conversation, images, videos, audio), **options))

    def resized(self, image: Image.Image, size: ImageSize | None, row_name: str) -> Image.Image:
        """Return an image in the size that its row asks for, before the processor sees it; see `sides_of_row`."""
        sides = self.sides_of_row((image.height, image.width), size, row_name)
        if sides == (image.height, image.width):
            return image
        return image.resize(sides[::-1], Image.Resampling.BICUBIC)

    def sides_of_row(self, sides: Sides, size: ImageSize | None, row_name: str) -> Sides:
        """Return the height and width that the row of an image asks for; its own, where the processor gives them.

        Args:
            sides: the image's own.
            size: what the row asks for, if anything.
            row_name: file and line of the row, for error messages.

        Raises:
            DataError: the model scales all images to one size, or the processor's limits would change this one.
        """
        if size is None:
            return sides
        fit = None if self.rules.media is None else self.rules.media.fit_image
        if fit is None:
            raise DataError(
                "the row asks for the size of an image, which this model does not choose", row_name, "remove the keys"
            )
        own = ImageSize()
        try:
            asked = fit(self.processor, sides, size)
            if asked == fit(self.processor, sides, own):
                return sides
            kept = fit(self.processor, asked, own)
        except ValueError as error:
            raise DataError(f"the size that the row asks of an image: {error}", row_name, "correct it") from None
        if kept != asked:
            raise DataError(
                f"the row asks for an image of {asked[0]} x {asked[1]} pixels, which the processor would make "
                f"{kept[0]} x {kept[1]}",
                row_name,
                "correct the row, or widen the limits with data.min_pixels and data.max_pixels",
            )
        return asked

    def sample_frames(self, metadata: VideoMetadata, frames_per_second: float | None) -> np.ndarray:
        """Return the indices of the frames that the video processor samples from a file; see `videos.Sampler`."""
        processor = self.processor.video_processor
        if frames_per_second is not None and processor.num_frames is not None:
            # The processor would take its own number of frames all the same.
            return default_sample_indices_fn(metadata, fps=frames_per_second)
        if frames_per_second is not None:
            return processor.sample_frames(metadata=metadata, fps=frames_per_second)
        if not processor.do_sample_frames:
            return np.arange(metadata.total_num_frames)
        return processor.sample_frames(metadata=metadata, num_frames=processor.num_frames, fps=processor.fps)

    @property
    def audio_limits(self) -> tuple[int, int]:
        """The rate at which the processor takes audio, in samples per second, and the most samples of a clip.

        Only of models that take audio.
        """
        assert self.rules.media is not None and self.rules.media.most_audio_samples is not None
        return self.processor.feature_extractor.sampling_rate, self.rules.media.most_audio_samples

    @property
    def padding_token_id(self) -> int:
        """Id of a harmless token for padding and padding samples."""
        return int(self.tokenizer.pad_token_id or 0)

    @cached_property
    def shortest_image_row_tokens(self) -> int:
        """Length in tokens of a conversation with the smallest image and a one-letter answer.

        Some templates refuse an empty answer. A processor that leaves images as they are knows no smallest one: 0.
        """
        if getattr(self.processor.image_processor, "do_resize", True) is False:
            return 0
        blank = ImagePart(ImageSource(data=b""))
        conversation = Conversation((Message("user", (blank,)), Message("assistant", "a")), "a blank image")
        return len(self.encode(conversation, [Image.new("RGB", (2, 2))]).input_ids)

    def _probe_prompt(self) -> str:
        """Render a minimal conversation with the template; return an empty string if it refuses."""
        contents: list[Any] = ["a", "b"]
        if self.rules.media is not None:
            contents = [[{"type": "text", "text": text}] for text in contents]
        messages = [
            {"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=True)
        ]
        try:
            with limit_rendering(self.template):
                return self._render(messages)[0]
        except REFUSALS:
            return ""

    def _apply_template(self, messages: list[dict[str, Any]], videos: Sequence[Video]) -> dict[str, Any]:
        """Return the processor's output for one conversation, without the batch dimension on text."""
        options: dict[str, Any] = {"tokenize": True, "return_dict": True}
        if self.rules.media is None:
            output = self.processor.apply_chat_template(
                messages, tokenizer_kwargs={"return_offsets_mapping": True}, **options
            )
            return dict(output)
        processor_options: dict[str, Any] = {
            "return_offsets_mapping": True,
            "return_text_replacement_offsets": True,
            "return_mm_token_type_ids": False,  # unused, and slow to make
            # Lists even where a processor would make tensors, which transformers is slow to walk for its masks.
            "text_kwargs": {"return_tensors": None},
        }
        if videos:
            processor_options |= _of_videos(videos)
        output = self.processor.apply_chat_template(messages, processor_kwargs=processor_options, **options)
        per_text = ("input_ids", "offset_mapping", "text_replacement_offsets")
        return {key: value[0] if key in per_text else value for key, value in output.items()}

    def _messages(
        self,
        conversation: Conversation,
        images: Sequence[Image.Image],
        videos: Sequence[Video],
        audio: Sequence[np.ndarray],
    ) -> list[dict[str, Any]]:
        """Return the messages that the template takes."""
        messages = conversation.template_messages(images, [video.frames for video in videos], audio)
        return self._place_thinking(messages, conversation.row_name) if conversation.has_thinking else messages

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """Refuse control tokens in the text of messages: they would forge images, or turns found by markers."""
        for message in conversation.messages:
            texts = [part.text for part in message.parts if isinstance(part, TextPart | ThinkingPart)]
            # Templates join parts, some without the spaces around them.
            for text in ("".join(text.strip() for text in texts), str(message.fields or "")):
                if found := self._forging_token.search(text):
                    raise DataError(
                        f"the text of a message contains the control token {found.group()}",
                        conversation.row_name,
                        "remove it from the text, or use a chat template with generation tags",
                    )

    def _refuse_ids_without_rows(self, input_ids: np.ndarray, row_name: str) -> None:
        """Refuse ids past the embedding: sharded and padded, it would read rows that mean nothing, or none at all."""
        vocab_size = self.rules.vocab_size
        if vocab_size is None or input_ids.max(initial=0) < vocab_size:
            return
        number = int(input_ids[np.argmax(input_ids >= vocab_size)])
        raise DataError(
            f"the row has the token {self.tokenizer.convert_ids_to_tokens(number)} with id {number}, but the model's "
            f"embedding has {vocab_size} rows",
            row_name,
            "remove it from the row, or resize the model's embedding (resize_token_embeddings in transformers)",
        )

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Render messages as `apply_chat_template` does; return the text and what stands between generation tags."""
        output: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=self.has_generation_tags,
            **self.tokenizer.special_tokens_map,
        )
        texts, tagged = output
        return texts[0], [Span(*span) for span in tagged[0]] if tagged else []

    def _place_thinking(self, messages: list[dict[str, Any]], row_name: str) -> list[dict[str, Any]]:
        """Return messages with their thinking where the template looks for it: in a part, or beside the content."""
        if self._thinking_style == "part":
            return messages
        if self._thinking_style == "field":
            return [_with_reasoning_field(message, row_name) for message in messages]
        raise DataError(
            "the chat template writes no thinking", row_name, "remove the thinking, or use a template that writes it"
        )

    @cached_property
    def _thinking_style(self) -> Literal["part", "field"] | None:
        if self._writes_thinking([{"type": "thinking", "thinking": PROBE}, {"type": "text", "text": "b"}]):
            return "part"
        return "field" if self._writes_thinking("b", **{REASONING_FIELD: PROBE}) else None

    def _writes_thinking(self, content: Any, **fields: str) -> bool:
        question = [{"type": "text", "text": "a"}] if isinstance(content, list) else "a"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content, **fields}]
        try:
            with limit_rendering(self.template):
                return PROBE in self._render(messages)[0]
        except REFUSALS:
            return False

    def _find_spans(
        self, messages: list[dict[str, Any]], conversation: Conversation, trains_all: bool
    ) -> tuple[list[Span], list[Span]]:
        """Return the characters of every answer, and those in them that are not trained because they are thinking."""
        row_name = conversation.row_name
        answers = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
        rendered, spans = self._render(messages)
        parts = [part for message in conversation.messages for part in message.parts]
        said = sum(len(part.text) for part in parts if isinstance(part, TextPart | ThinkingPart))
        if len(rendered) > MOST_ADDED_CHARACTERS + 4 * said:
            raise DataError(
                f"the chat template makes {len(rendered):,} characters of {said:,}", row_name, "correct the template"
            )
        if self.has_generation_tags and trains_all and not conversation.has_thinking:
            return spans, []
        marks = find_marks(rendered, self._render(mark_messages(messages))[0], row_name)
        if not self.has_generation_tags:
            spans = find_answers(rendered, marks, answers, self.rules, row_name)
        elif not trains_all:
            match_tagged_answers(spans, marks, answers, row_name)
        check_thinking(messages, marks, row_name)
        return spans, [] if self.train_thinking else find_thinking(spans, marks, row_name)

    def _mask(
        self,
        input_ids: np.ndarray,
        output: dict[str, Any],
        spans: list[Span],
        untrained: list[Span],
        losses: list[bool],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which tokens of answers, but the untrained, are trained, [S] bool, and the end of each answer.

        An answer's trained text starts after the start marker and ends with the end-of-turn token; the line break that
        templates put after that token is not trained, because generation stops before it.
        """
        offsets = np.array(output["offset_mapping"], np.int64).reshape(-1, 2)
        replacements = output.get("text_replacement_offsets") or []
        answer = tokens_of_spans(spans, offsets, replacements, whole=not self.has_generation_tags)
        answered = answer >= 0
        answer_ends = np.zeros(len(spans), np.int64)
        np.maximum.at(answer_ends, answer[answered], np.flatnonzero(answered) + 1)
        # Features of a medium inside an answer are inputs, never targets.
        trained = answered & ~np.isin(input_ids, self.rules.media_token_ids)
        trained &= tokens_of_spans(untrained, offsets, replacements, whole=False) < 0
        if not all(losses):
            trained &= np.array([*losses, False])[answer]
        return trained, answer_ends


def _of_videos(videos: Sequence[Video]) -> dict[str, Any]:
    """Options for the processor: files were sampled when they were read; of lists of frames, all frames are taken."""
    return {"do_sample_frames": False, "video_metadata": [video.metadata for video in videos]}


def _with_reasoning_field(message: dict[str, Any], row_name: str) -> dict[str, Any]:
    """Return a message with its thinking part, which must be the first and only one, beside its content."""
    parts = message["content"] if isinstance(message["content"], list) else []
    places = [place for place, part in enumerate(parts) if part["type"] == "thinking"]
    if not places:
        return message
    if places != [0]:
        raise DataError(
            "the chat template takes thinking only before what a message says",
            row_name,
            "write one thinking part, and write it first",
        )
    said = parts[1:]
    content = said[0]["text"] if [part["type"] for part in said] == ["text"] else said
    return {**message, "content": content, REASONING_FIELD: parts[0]["thinking"]}


def _turn_tokens(tokenizer: Any, rules: PromptRules) -> set[str]:
    """Return the tokens that would forge a turn: turn markers, tokens that they consist of, and their like.

    Some tokenizers do not call those special, and to some a marker is ordinary text.
    """
    markers = {rules.assistant_start.strip(), rules.assistant_end, *rules.other_starts, *rules.turn_tokens}
    markers |= {token for name in ("bos", "eos", "pad") if (token := getattr(tokenizer, f"{name}_token"))}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return markers | {token for token in added if token.startswith("<") and token in "".join(markers)}


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
