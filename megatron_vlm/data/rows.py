"""Read one slot of the plan as one sample, with the policies for bad and too long rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from megatron_vlm.config import Config, DataSettings, DataSource, source_names
from megatron_vlm.data import row_keys
from megatron_vlm.data.audio import require_audio_packages
from megatron_vlm.data.collate import LoadedSample
from megatron_vlm.data.conversation import Conversation
from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.media_loading import MediaLoader, MediaMeasurer
from megatron_vlm.data.plan import PlannedSource
from megatron_vlm.data.prompts import PromptBuilder, Sample
from megatron_vlm.data.row_lengths import PADDING_STATUSES, RowLengths, RowStatus, measured_as_bad
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.source_rows import SourceRows, index_sources
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.data.videos import require_decoder
from megatron_vlm.errors import ConfigError, DataError

ROWS_PEEKED_FOR_IMAGES = 256
# Past these, or so many per token of data.seq_length, a row is refused before its text is rendered and tokenised, which
# could take minutes; a token has no more characters than that but in runs of blanks.
MOST_CHARACTERS, CHARACTERS_PER_TOKEN = 2**20, 32
MOST_MESSAGES = 4096


class RowReader:
    """Reads rows of several sources as samples.

    Args:
        sources: the data files with their weights in the blend.
        settings: the configuration's `data` section.
        builder: encodes conversations with the model's processor and chat template.

    Raises:
        DataError: a file is missing or empty, or (strict) has a line that is no JSON object.
        ConfigError: seq_length is too short for one image and the data have images, or they have video files and the
            package that decodes them is not installed.
    """

    def __init__(self, sources: Sequence[DataSource], settings: DataSettings, builder: PromptBuilder) -> None:
        self.settings = settings
        self.builder = builder
        self.media = MediaLoader(builder, self.url_access)
        self._names = source_names(sources)
        self.weights = [source.weight for source in sources]
        self.sources = index_sources([source.path for source in sources])
        self._rendered = row_keys.names_in(builder.template)
        for rows in self.sources:
            if settings.strict and rows.unparsable_rows:
                self._parse(rows, rows.unparsable_rows[0])
        self._check_first_rows()

    @property
    def url_access(self) -> UrlAccess:
        """Which URLs of images and audio are fetched."""
        if not self.settings.allow_urls:
            return UrlAccess.NONE
        return UrlAccess.ALL if self.settings.allow_private_urls else UrlAccess.PUBLIC

    @property
    def names(self) -> list[str]:
        """Names of the sources, for reports."""
        return self._names

    def planned_sources(self) -> list[PlannedSource]:
        """Return the facts about the sources that the plan depends on."""
        return [
            PlannedSource(rows.path, rows.num_rows, rows.digest, weight)
            for rows, weight in zip(self.sources, self.weights, strict=True)
        ]

    def conversation(self, source: int, row: int) -> Conversation:
        """Parse a row and check that the model takes its images, videos and audio.

        Raises:
            DataError: the row has none of the known formats, or media that the model does not take.
        """
        rows = self.sources[source]
        conversation = self._parse(rows, row)
        rules = self.builder.rules
        if conversation.images and rules.image_token_id is None:
            raise DataError(
                "the row has images but the model is text-only", rows.name(row), "remove the images or the row"
            )
        if conversation.videos and rules.video_token_id is None:
            raise DataError(
                "the row has videos, which this model does not take", rows.name(row), "remove the videos or the row"
            )
        if conversation.audio and rules.audio_token_id is None:
            raise DataError(
                "the row has audio, which this model does not take", rows.name(row), "remove the audio or the row"
            )
        return conversation

    def read(self, source: int, row: int) -> LoadedSample:
        """Return the sample of one row; a row that cannot be used keeps its slot as a padding sample without weight.

        Raises:
            DataError: the row is bad and `strict` is set, or too long and `too_long` is `error`.
            ConfigError: the row has an image and seq_length is too short for any.
        """
        name = self.sources[source].name(row)
        try:
            conversation, sample = self._conversation_and_sample(source, row)
        except DataError as error:
            if self.settings.strict:
                raise
            return LoadedSample(self._padding_sample(), source, name, bad=True, problem=f"bad row: {error}")
        if not sample.trained.any():
            # All of its answers are empty and dropped.
            return LoadedSample(self._padding_sample(sample.empty_answers), source, name)
        if len(sample.input_ids) <= self.settings.seq_length:
            return LoadedSample(sample, source, name, unknown_keys=conversation.unknown_keys)
        return self._too_long(conversation, sample, source)

    def measuring(self) -> RowReader:
        """Return a reader of the same rows that decodes nothing (`MediaMeasurer`): for their lengths, not for training.

        Its policies never raise, so that all rows can be measured: bad and too long ones become padding samples.
        """
        reader = copy.copy(self)
        reader.media = MediaMeasurer(self.builder, self.url_access)
        too_long: Literal["drop", "truncate", "error"] = (
            "drop" if self.settings.too_long == "error" else self.settings.too_long
        )
        reader.settings = dataclasses.replace(self.settings, strict=False, too_long=too_long)
        return reader

    def read_measured(self, source: int, row: int, lengths: RowLengths) -> LoadedSample:
        """Return what `read` gives for a row whose length is known, and make sure that it has that length.

        A row that became a padding sample when it was measured stays one; nothing of it is decoded.

        Args:
            source: of the row.
            row: its number in the source.
            lengths: of the source.

        Raises:
            DataError: see `read`; or the row has another length than when it was measured.
            ConfigError: see `read`.
        """
        expected, status = int(lengths.tokens[row]), lengths.status[row]
        loaded = self._measuring.read(source, row) if status in PADDING_STATUSES else self.read(source, row)
        if loaded.bad or len(loaded.sample.input_ids) == expected:
            return loaded
        name = self.sources[source].name(row)
        if status == RowStatus.BAD:
            problem = f"bad row: {measured_as_bad(name, lengths)}"
            return LoadedSample(self._padding_sample(), source, name, bad=True, problem=problem)
        found = self.num_tokens(source, row) if loaded.too_long else len(loaded.sample.input_ids)
        raise DataError(
            f"the row has {found} tokens, and had {expected} when lengths were measured: its media were replaced",
            name,
            f"put them back; or delete {lengths.stored_at} on every node, and start again with a new run_dir",
        )

    def transformers_inputs(self, source: int, row: int) -> dict[str, Any]:
        """Return what transformers' model takes for a row, from the processor: token ids [1, S], pixels and so on.

        Raises:
            DataError: the row is bad.
        """
        conversation = self.conversation(source, row)
        return self.builder.transformers_inputs(conversation, *self.media.load(conversation))

    def num_tokens(self, source: int, row: int) -> int:
        """Return the length of a row, whatever data.seq_length is.

        Raises:
            DataError: the row is bad.
        """
        return len(self._conversation_and_sample(source, row)[1].input_ids)

    def empty(self, source: int) -> LoadedSample:
        """Return a padding sample for a slot that holds no row."""
        return LoadedSample(self._padding_sample(), source, "")

    @cached_property
    def _measuring(self) -> RowReader:
        return self.measuring()

    def _parse(self, rows: SourceRows, row: int) -> Conversation:
        file, row = rows.locate(row)
        return parse_row(file.read(row), file.name(row), file.directory, self._rendered)

    def _conversation_and_sample(self, source: int, row: int) -> tuple[Conversation, Sample]:
        conversation = self.conversation(source, row)
        self._refuse_huge(conversation)
        return conversation, self.media.encode(conversation)

    def _refuse_huge(self, conversation: Conversation) -> None:
        tokens = self.settings.seq_length
        for what, count, limit in (
            ("characters", conversation.characters, max(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * tokens)),
            ("messages", len(conversation.messages), max(MOST_MESSAGES, tokens)),
        ):
            if count > limit:
                raise DataError(f"the row has {count} {what}, more than {limit}", conversation.row_name, "split it")

    def _padding_sample(self, empty_answers: int = 0) -> Sample:
        """Return a sample of one token that trains nothing."""
        ids = np.array([self.builder.padding_token_id], np.int64)
        return Sample(ids, np.zeros(1, bool), empty_answers=empty_answers)

    def _too_long(self, conversation: Conversation, sample: Sample, source: int) -> LoadedSample:
        limit, name = self.settings.seq_length, conversation.row_name
        if sample.count("image"):
            self._refuse_short_sequences(name)
        what = f"the row has {len(sample.input_ids)} tokens, more than data.seq_length {limit}"
        if self.settings.too_long == "error":
            raise DataError(what, name, "raise data.seq_length, or set data.too_long to drop or truncate")
        if self.settings.too_long == "truncate":
            shorter = self._truncate(conversation, sample)
            if shorter is not None:
                return LoadedSample(shorter, source, name, truncated=True)
            what += " and no leading turns of it fit"
        return LoadedSample(self._padding_sample(), source, name, too_long=True, problem=f"dropped: {what} [{name}]")

    def _truncate(self, conversation: Conversation, sample: Sample) -> Sample | None:
        """Render the most leading messages that end with an assistant's, fit, and train something; None if none do."""
        limit = self.settings.seq_length
        turns_that_may_fit = int((sample.answer_ends <= limit).sum())
        answers = [number for number, message in enumerate(conversation.messages, 1) if message.role == "assistant"]
        # A template may tag more or fewer texts than the answers: then every earlier answer is a candidate.
        complete = len(sample.answer_ends) == len(answers)
        for count in reversed(answers[:turns_that_may_fit] if complete else answers[:-1]):
            try:
                shorter = self.media.encode(conversation.first_messages(count))
            except DataError:
                continue
            if len(shorter.input_ids) <= limit:
                return shorter
        return None

    def _refuse_short_sequences(self, where: str) -> None:
        needed = self.builder.shortest_image_row_tokens
        if self.settings.seq_length < needed:
            raise ConfigError(
                f"data.seq_length {self.settings.seq_length} is too short for one image, which needs {needed} tokens",
                where,
                f"set data.seq_length to at least {needed} plus the text",
            )

    def _check_first_rows(self) -> None:
        """Refuse at once where they have images beyond seq_length, or videos or audio that cannot be decoded."""
        if self.builder.rules.media is None:
            return
        for source, rows in enumerate(self.sources):
            for row in islice(range(rows.num_rows), ROWS_PEEKED_FOR_IMAGES):
                try:
                    conversation = self.conversation(source, row)
                except DataError:
                    continue
                if any(video.path is not None for video in conversation.videos):
                    require_decoder(conversation.row_name)
                if conversation.audio:
                    require_audio_packages(conversation.row_name)
                if conversation.images:
                    self._refuse_short_sequences(conversation.row_name)
                    break


def reader_for(config: Config, sources: Sequence[DataSource], rules: PromptRules) -> RowReader:
    """Build the configuration's reader of `sources`; errors are those of `PromptBuilder` and `RowReader`."""
    data = config.data
    builder = PromptBuilder(
        config.model.hf_path, rules, data.min_pixels, data.max_pixels, data.train_thinking, data.drop_empty_answers
    )
    return RowReader(sources, data, builder)


def unknown_key_note(key: str, source: str, rows: str) -> str:
    """Return the line that names a key of a source's rows which means nothing."""
    return f"the key {key!r} means nothing here ({source}: {rows})"


def empty_answer_note(row_name: str, dropped: bool) -> str:
    """Return the line that names the first row with an empty answer of a source."""
    if dropped:
        return f"an answer has no words and is left out of the loss (data.drop_empty_answers) [{row_name}]"
    return (
        f"an answer has no words; its end-of-turn token is trained all the same [{row_name}] -- correct the row, or "
        "set data.drop_empty_answers to leave such answers out of the loss"
    )
