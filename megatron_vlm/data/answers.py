"""Find what the assistant says in a rendered conversation, as spans of characters and as tokens.

A template may put messages in any order, join them and write text of its own around them. To be sure which text is
whose, the conversation is rendered a second time with a mark behind every text: a character that no text has, and the
number of the message. Without its marks that rendering must be the first one; then the places of the marks tell which
message each part of it belongs to, and between the marks only the template writes turn markers.

Characters are counted in the rendered text, before placeholders of media are expanded.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import numpy as np

from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError

# Noncharacters of Unicode, which are for such internal use and never in texts that programs exchange.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{MARK_OPEN}(text|thinking|start)(\\d+){MARK_CLOSE}")
USE_TAGS = "use a chat template with generation tags, or correct the row"
REASONING_FIELD = "reasoning_content"
Kind = Literal["text", "thinking", "start"]
"""What a mark stands behind: a text, or thinking; or that it stands before a text that follows thinking."""


@dataclass(frozen=True)
class Span:
    """Characters of the rendered text, from `start` up to but not including `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Mark:
    """A mark that the template wrote: its kind, the number of its message, and where in the rendered text it stood."""

    kind: Kind
    message: int
    position: int


def mark_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a chat template with a mark behind every text; an answer without text is given an empty one.

    A mark stands before the spaces that end its text, which templates may trim.
    """
    marked = []
    for number, message in enumerate(messages):
        message = dict(message)
        content, is_assistant = message["content"], message["role"] == "assistant"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if is_assistant and all(part["type"] != "text" for part in parts):
            parts.append({"type": "text", "text": ""})
        follows_thinking = is_assistant and REASONING_FIELD in message
        if follows_thinking:
            message[REASONING_FIELD] = _mark(message[REASONING_FIELD], "thinking", number)
        for place, part in enumerate(parts):
            if part["type"] == "thinking":
                parts[place] = {**part, "thinking": _mark(part["thinking"], "thinking", number)}
            elif part["type"] == "text":
                text = _mark(part["text"], "text", number)
                parts[place] = {**part, "text": _mark_start(text, number) if follows_thinking else text}
                follows_thinking = False
            follows_thinking = follows_thinking or part["type"] == "thinking"
        marked.append({**message, "content": parts[0]["text"] if isinstance(content, str) else parts})
    return marked


def _mark(text: str, kind: Kind, number: int) -> str:
    words = text.rstrip()
    return f"{words}{MARK_OPEN}{kind}{number}{MARK_CLOSE}{text[len(words) :]}"


def _mark_start(text: str, number: int) -> str:
    words = text.lstrip()
    return f"{text[: len(text) - len(words)]}{MARK_OPEN}start{number}{MARK_CLOSE}{words}"


def find_marks(rendered: str, marked: str, row_name: str) -> list[Mark]:
    """Return the marks in the order in which the template wrote them.

    Args:
        rendered: the conversation's rendering.
        marked: the rendering of `mark_messages(messages)`.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: without its marks, `marked` is another text.
    """
    marks: list[Mark] = []
    pieces, read, length = [], 0, 0
    for found in MARK.finditer(marked):
        pieces.append(marked[read : found.start()])
        length += len(pieces[-1])
        marks.append(Mark(cast(Kind, found[1]), int(found[2]), length))
        read = found.end()
    if "".join([*pieces, marked[read:]]) != rendered:
        raise DataError(
            "where answers start and end cannot be determined: the chat template changes texts by what they end with",
            row_name,
            USE_TAGS,
        )
    return marks


def find_answers(
    rendered: str, marks: Sequence[Mark], answers: Sequence[int], rules: PromptRules, row_name: str
) -> list[Span]:
    """Find answers by the family's turn markers; texts have none, so that all markers are the template's.

    An answer starts after the last start marker between the text of another message and its own. It ends with the first
    end-of-turn token after its own text, which must come before the text of another message.

    Args:
        rendered: the conversation's rendering.
        marks: the marks in it.
        answers: numbers of the assistant's messages.
        rules: the family's prompt rules.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: an answer's start or end cannot be determined.
    """
    # The first and the last mark of each run of marks of one message.
    runs = [(run[0], run[-1]) for run in (list(group) for _, group in groupby(marks, key=lambda mark: mark.message))]
    places: dict[int, list[int]] = {}
    for place, (first, _) in enumerate(runs):
        places.setdefault(first.message, []).append(place)
    spans: list[Span] = []
    for message in answers:
        found = places.get(message, [])
        if len(found) != 1:
            times = "not at all" if not found else f"in {len(found)} places"
            raise DataError(f"the chat template writes the answer in message {message + 1} {times}", row_name, USE_TAGS)
        place, (first, last) = found[0], runs[found[0]]
        before = runs[place - 1][1].position if place else 0
        after = runs[place + 1][0].position if place + 1 < len(runs) else len(rendered)
        starts = [
            start + len(marker)
            for marker in (rules.assistant_start, *rules.other_starts)
            if (start := rendered.rfind(marker, before, first.position)) >= 0
        ]
        end = rendered.find(rules.assistant_end, last.position, after)
        if not starts or end < 0:
            what = "start" if not starts else "end"
            raise DataError(
                f"the chat template does not mark the {what} of the answer in message {message + 1}", row_name, USE_TAGS
            )
        if spans and max(starts) < spans[-1].end:
            raise DataError("the chat template writes answers in another order than the row's", row_name, USE_TAGS)
        spans.append(Span(max(starts), end + len(rules.assistant_end)))
    return spans


def match_tagged_answers(spans: Sequence[Span], marks: Sequence[Mark], answers: Sequence[int], row_name: str) -> None:
    """Check that each of the spans between generation tags is that of one answer.

    Args:
        spans: what the template puts between generation tags.
        marks: the marks in the rendered text.
        answers: numbers of the assistant's messages.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: there is not one span for each answer, around its text.
    """
    ends = {mark.message: mark.position for mark in marks if mark.kind == "text"}
    if len(spans) != len(answers) or any(
        message not in ends or not span.start <= ends[message] <= span.end
        for message, span in zip(answers, spans, strict=True)
    ):
        raise DataError(
            f"answers cannot be left out of the loss: the template's generation tags hold {len(spans)} texts, the row "
            f"has {len(answers)} assistant messages",
            row_name,
            "write one {% generation %} block around each answer in the chat template",
        )


def check_thinking(messages: Sequence[dict[str, Any]], marks: Sequence[Mark], row_name: str) -> None:
    """Check that the template wrote all thinking; it may leave out what was thought before a later user's turn.

    Raises:
        DataError: it left out other thinking.
    """
    written = {mark.message for mark in marks if mark.kind == "thinking"}
    last_user = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for number, message in enumerate(messages):
        parts = message["content"] if isinstance(message["content"], list) else ()
        thinks = REASONING_FIELD in message or any(part["type"] == "thinking" for part in parts)
        if thinks and number not in written and (message["role"] != "assistant" or number > last_user):
            raise DataError(
                f"the chat template leaves out the thinking in message {number + 1}",
                row_name,
                "remove it, or use a chat template that writes it",
            )


def find_thinking(spans: Sequence[Span], marks: Sequence[Mark], row_name: str) -> list[Span]:
    """Return the parts of answers that are thinking: up to the text that follows, with what the template writes around.

    Args:
        spans: the answers.
        marks: the marks in the rendered text.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: an answer ends with thinking.
    """
    starts = [span.start for span in spans]
    found: list[Span] = []
    said, begun = 0, None
    for mark in (*marks, Mark("text", -1, 0)):
        if mark.kind == "thinking":
            place = bisect_right(starts, mark.position) - 1
            if begun is None and place >= 0 and mark.position <= spans[place].end:
                begun = Mark("thinking", mark.message, max(spans[place].start, said))
            continue
        if begun is not None and mark.message != begun.message:
            raise DataError(
                f"the answer in message {begun.message + 1} ends with thinking, which data.train_thinking leaves out",
                row_name,
                "write what the assistant says after it, or set data.train_thinking to true",
            )
        if begun is not None:
            found.append(Span(begun.position, mark.position))
            begun = None
        said = mark.position
    return found


def tokens_of_spans(
    spans: Sequence[Span], offsets: np.ndarray, replacements: Sequence[dict[str, Any]], whole: bool
) -> np.ndarray:
    """Return for every token the index of the span that it belongs to, -1 for none: [S] int64.

    Args:
        spans: in ascending order, without overlap.
        offsets: first and last character (exclusive) of each token in the text with expanded placeholders, [S, 2].
        replacements: transformers' description of the placeholders that were expanded.
        whole: a token belongs to a span that contains it; otherwise, to one that it overlaps.
    """
    if not spans:
        return np.full(len(offsets), -1)
    limits = np.array([(span.start, span.end) for span in spans], np.int64)
    # Placeholders that end at or before a character move it by what was inserted for them.
    ends = np.array([item["span"][1] for item in replacements], np.int64)
    grown = [(item["new_span"][1] - item["new_span"][0]) - (item["span"][1] - item["span"][0]) for item in replacements]
    gained = np.concatenate(([0], np.cumsum(np.array(grown, np.int64))))
    starts, ends = (limits + gained[np.searchsorted(ends, limits, side="right")]).T
    first, last = offsets.T
    span = np.searchsorted(starts, first, side="right") - 1 if whole else np.searchsorted(starts, last) - 1
    inside = (last <= ends[span]) if whole else (first < ends[span])
    return np.where((span >= 0) & inside & (last > first), span, -1)
