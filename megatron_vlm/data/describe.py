"""Show what the model will see: decoded samples with the trained text marked, and a check of all rows."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from megatron_vlm.config import Config
from megatron_vlm.data.audio import require_audio_packages
from megatron_vlm.data.collate import LoadedSample
from megatron_vlm.data.images import read_bytes
from megatron_vlm.data.plan import SamplePlan
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader, empty_answer_note, reader_for, unknown_key_note
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.videos import check_video_file
from megatron_vlm.errors import DataError

TRAINED_OPEN, TRAINED_CLOSE = "[[", "]]"
MOST_PROBLEMS_LISTED = 20
COUNTED_MEDIA = {"image": "images", "video": "videos", "audio": "audio clips"}


def describe_samples(config: Config, rules: PromptRules, num: int = 3) -> str:
    """Return the first `num` samples in the order of the run as text; trained text stands between [[ and ]].

    Packing puts those that are near each other in this order into one row.

    Args:
        config: the run's configuration.
        rules: the family's prompt rules.
        num: how many samples.

    Raises:
        ConfigError, DataError: see `PromptBuilder` and `RowReader`.
    """
    reader = reader_for(config, config.data.train, rules)
    plan = SamplePlan(reader.planned_sources(), config.train.seed, config.data.shuffle)
    places = plan.rows(0, num)
    described = [describe_sample(reader.read(place.source, place.row), reader.builder) for place in places]
    return "\n\n".join(f"sample {number} of {num}: {text}" for number, text in enumerate(described, start=1))


def describe_sample(loaded: LoadedSample, builder: PromptBuilder) -> str:
    """Describe one sample: its name and figures, then its decoded tokens."""
    if loaded.problem:
        return f"{loaded.row_name}\n{loaded.problem}"
    sample = loaded.sample
    figures = [f"{len(sample.input_ids)} tokens", f"{int(sample.trained.sum())} trained"]
    if sample.media:
        shapes = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in sample.media_inputs.items()]
        counts = [(sample.count(kind), what) for kind, what in COUNTED_MEDIA.items()]
        found = " and ".join(f"{count} {what}" for count, what in counts if count)
        figures.append(f"{found} ({', '.join(shapes)})")
    if sample.empty_answers:
        figures.append(f"{sample.empty_answers} empty answers")
    if loaded.truncated:
        figures.append("cut at a turn boundary")
    return f"{loaded.row_name} ({', '.join(figures)})\n{marked_text(sample.input_ids, sample.trained, builder)}"


def marked_text(input_ids: np.ndarray, trained: np.ndarray, builder: PromptBuilder) -> str:
    """Decode tokens, with the trained text between [[ and ]]; runs of placeholders are counted, not repeated."""
    pieces = []
    placeholders = builder.rules.media_token_ids
    for (is_trained, is_medium), run in groupby(
        zip(input_ids.tolist(), trained.tolist(), strict=True), key=lambda pair: (pair[1], pair[0] in placeholders)
    ):
        tokens = [token for token, _ in run]
        text = builder.tokenizer.decode(tokens[:1] if is_medium else tokens, clean_up_tokenization_spaces=False)
        text = f"{text} x {len(tokens)} " if is_medium else text
        pieces.append(f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}" if is_trained else text)
    return "".join(pieces)


@dataclass
class RowCheck:
    """The result of a pass over all rows."""

    rows: int = 0
    images: int = 0
    videos: int = 0
    audio_clips: int = 0
    bad_rows: int = 0
    problems: list[str] = field(default_factory=list)
    """The first problems, one line each."""
    empty_answers: int = 0
    notes: list[str] = field(default_factory=list)
    """Lines that name the first row with an empty answer of each source, and keys that mean nothing."""

    def __str__(self) -> str:
        videos = f"{self.videos} videos, " if self.videos else ""
        audio = f"{self.audio_clips} audio clips, " if self.audio_clips else ""
        empty = f", {self.empty_answers} empty answers" if self.empty_answers else ""
        return f"{self.rows} rows, {self.images} images, {videos}{audio}{self.bad_rows} bad rows{empty}"

    def note(self, error: DataError) -> None:
        self.bad_rows += 1
        if len(self.problems) < MOST_PROBLEMS_LISTED:
            self.problems.append(str(error))


@dataclass
class LengthCheck:
    """Lengths in tokens of the rows that were encoded; bad rows have none.

    Attributes:
        seq_length: data.seq_length.
        rows: how many rows there are.
        lengths: of those encoded.
        bad_rows: those that could not be.
    """

    seq_length: int
    rows: int
    lengths: list[int] = field(default_factory=list)
    bad_rows: int = 0

    @property
    def too_long(self) -> int:
        """How many are longer than data.seq_length."""
        return sum(length > self.seq_length for length in self.lengths)

    def __str__(self) -> str:
        bad = f", {self.bad_rows} bad rows" if self.bad_rows else ""
        if not self.lengths:
            return f"no lengths of {self.rows} rows{bad}"
        mean = sum(self.lengths) / len(self.lengths)
        return (
            f"{min(self.lengths)} to {max(self.lengths)} tokens, {mean:.0f} in the mean, {self.too_long} longer than "
            f"data.seq_length {self.seq_length} ({len(self.lengths)} of {self.rows} rows encoded{bad})"
        )


def check_lengths(reader: RowReader, most_per_source: int | None = None) -> LengthCheck:
    """Encode rows as training will, images, videos and audio included, and count their tokens.

    Args:
        reader: reads rows of the sources.
        most_per_source: how many rows of each source, evenly spaced; None encodes all.

    Raises:
        DataError: more rows are too long than `max_too_long_fraction` allows, where such rows are left out, or any is,
            where `too_long` is `error`.
    """
    settings = reader.settings
    check = LengthCheck(settings.seq_length, sum(rows.num_rows for rows in reader.sources))
    for source, rows in enumerate(reader.sources):
        count = rows.num_rows if most_per_source is None else min(most_per_source, rows.num_rows)
        for row in (number * rows.num_rows // count for number in range(count)):
            try:
                check.lengths.append(reader.num_tokens(source, row))
            except DataError:
                check.bad_rows += 1
    allowed = {"error": 0.0, "truncate": 1.0}.get(settings.too_long, settings.max_too_long_fraction)
    if check.too_long > allowed * len(check.lengths):
        raise DataError(
            f"too many rows are too long: {check}",
            fix="raise data.seq_length, set data.too_long to truncate, or raise data.max_too_long_fraction",
        )
    return check


def check_rows(reader: RowReader) -> RowCheck:
    """Parse every row and look for every image, video and audio file (not decoding it).

    Args:
        reader: reads rows of the sources.

    Raises:
        DataError: `strict` is set and a row is bad, or more than `max_bad_fraction` of all rows are.
        ConfigError: there are video files, and the package that decodes them is not installed.
    """
    check = RowCheck()
    for source, rows in enumerate(reader.sources):
        is_named, unknown_keys = False, Counter[str]()
        for row in range(rows.num_rows):
            check.rows += 1
            try:
                conversation = reader.conversation(source, row)
                unknown_keys.update(conversation.unknown_keys)
                if empty_answers := conversation.empty_answers:
                    check.empty_answers += empty_answers
                    if not is_named:
                        note = empty_answer_note(conversation.row_name, reader.builder.drop_empty_answers)
                        check.notes.append(note)
                    is_named = True
                check.images += len(conversation.images)
                check.videos += len(conversation.videos)
                check.audio_clips += len(conversation.audio)
                for video in conversation.videos:
                    if video.path is not None:
                        check_video_file(video, conversation.row_name)
                if conversation.audio:
                    require_audio_packages(conversation.row_name)
                frames = [frame for video in conversation.videos for frame in video.frames]
                for encoded in (*conversation.images, *frames, *conversation.audio):
                    if encoded.url is not None and reader.settings.allow_urls:
                        continue
                    if encoded.path is None or not os.path.isfile(encoded.path):
                        read_bytes(encoded, conversation.row_name, reader.url_access)
            except DataError as error:
                if reader.settings.strict:
                    raise
                check.note(error)
        check.notes += [unknown_key_note(key, reader.names[source], f"{n} rows") for key, n in unknown_keys.items()]
    if check.bad_rows > reader.settings.max_bad_fraction * check.rows:
        raise DataError(
            f"{check.bad_rows} of {check.rows} rows are bad, more than data.max_bad_fraction "
            f"{reader.settings.max_bad_fraction}; the first: {check.problems[0]}",
            fix="repair the rows, or raise data.max_bad_fraction",
        )
    return check
