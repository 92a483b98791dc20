"""Find what the assistant says in a rendered conversation, as spans of characters and as tokens.

A template may put messages in any order, join them and write text of its own around them. To be sure which text is
whose, the conversation is rendered a second time with a mark behind every text: a character that no text has, and the
number of the message. Without its marks that rendering must be the first one; then the places of the marks tell which
message each part of it belongs to, and between the marks only the template writes turn markers.

Characters are counted in the rendered text, before placeholders of media are expanded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError

# Noncharacters of Unicode, which are for such internal use and never in texts that programs exchange.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{MARK_OPEN}(\\d+){MARK_CLOSE}")
USE_TAGS = "use a chat template with generation tags, or correct the row"


@dataclass(frozen=True)
class Span:
    """Characters of the rendered text, from `start` up to but not including `end`."""

    start: int
    end: int


def mark_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a chat template with a mark behind every text; an answer without text is given an empty one.

    A mark stands before the spaces that end its text, which templates may trim.
    """
    marked = []
    for number, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            content = _mark(content, number)
        else:
            content = [
                {**part, "text": _mark(part["text"], number)} if part["type"] == "text" else part for part in content
            ]
            if message["role"] == "assistant" and all(part["type"] != "text" for part in content):
                content.append({"type": "text", "text": _mark("", number)})
        marked.append({**message, "content": content})
    return marked


def _mark(text: str, number: int) -> str:
    words = text.rstrip()
    return f"{words}{MARK_OPEN}{number}{MARK_CLOSE}{text[len(words) :]}"


@dataclass(frozen=True)
class TextEnds:
    """Where the neighbouring texts of one message end in the rendered text: the first and the last of them."""

    message: int
    first: int
    last: int


def find_text_ends(rendered: str, marked: str, row_name: str) -> list[TextEnds]:
    """Locate the texts of messages.

    Args:
        rendered: the conversation's rendering.
        marked: the rendering of `mark_messages(messages)`.
        row_name: file and line of the row, for error messages.

    Returns:
        The ends of texts in the order in which the template wrote them.

    Raises:
        DataError: without its marks, `marked` is another text.
    """
    marks: list[tuple[int, int]] = []
    pieces, read, length = [], 0, 0
    for found in MARK.finditer(marked):
        pieces.append(marked[read : found.start()])
        length += len(pieces[-1])
        marks.append((int(found[1]), length))
        read = found.end()
    if "".join([*pieces, marked[read:]]) != rendered:
        raise DataError(
            "where answers start and end cannot be told, because the chat template changes texts by what they end with",
            row_name,
            USE_TAGS,
        )
    grouped = ((message, [end for _, end in group]) for message, group in groupby(marks, key=lambda mark: mark[0]))
    return [TextEnds(message, ends[0], ends[-1]) for message, ends in grouped]


def find_answers(
    rendered: str, text_ends: Sequence[TextEnds], answers: Sequence[int], rules: PromptRules, row_name: str
) -> list[Span]:
    """Find answers by the family's turn markers; texts have none, so that all markers are the template's.

    An answer starts after the last start marker between the text of another message and its own. It ends with the first
    end-of-turn token after its own text, which must come before the text of another message.

    Args:
        rendered: the conversation's rendering.
        text_ends: where its texts end.
        answers: numbers of the assistant's messages.
        rules: the family's prompt rules.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: an answer's start or end cannot be told.
    """
    places: dict[int, list[int]] = {}
    for place, ends in enumerate(text_ends):
        places.setdefault(ends.message, []).append(place)
    spans: list[Span] = []
    for message in answers:
        found = places.get(message, [])
        if len(found) != 1:
            times = "not at all" if not found else f"in {len(found)} places"
            raise DataError(f"the chat template writes the answer in message {message + 1} {times}", row_name, USE_TAGS)
        own = text_ends[found[0]]
        before = text_ends[found[0] - 1].last if found[0] else 0
        after = text_ends[found[0] + 1].first if found[0] + 1 < len(text_ends) else len(rendered)
        starts = [
            place + len(marker)
            for marker in (rules.assistant_start, *rules.other_starts)
            if (place := rendered.rfind(marker, before, own.first)) >= 0
        ]
        end = rendered.find(rules.assistant_end, own.last, after)
        if not starts or end < 0:
            what = "start" if not starts else "end"
            raise DataError(
                f"the chat template does not mark the {what} of the answer in message {message + 1}", row_name, USE_TAGS
            )
        if spans and max(starts) < spans[-1].end:
            raise DataError("the chat template writes answers in another order than the row's", row_name, USE_TAGS)
        spans.append(Span(max(starts), end + len(rules.assistant_end)))
    return spans


def match_tagged_answers(
    spans: Sequence[Span], text_ends: Sequence[TextEnds], answers: Sequence[int], row_name: str
) -> list[Span]:
    """Return the span of each answer, of spans between generation tags.

    Args:
        spans: what the template puts between generation tags.
        text_ends: where its texts end.
        answers: numbers of the assistant's messages.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: there is not one span for each answer, around its text.
    """
    ends = {message: end.last for message in answers for end in text_ends if end.message == message}
    if len(spans) != len(answers) or any(
        message not in ends or not span.start <= ends[message] <= span.end
        for message, span in zip(answers, spans, strict=True)
    ):
        raise DataError(
            f"`loss: false` cannot be applied: the template's generation tags hold {len(spans)} texts, the row has "
            f"{len(answers)} assistant messages",
            row_name,
            "write one {% generation %} block around each answer in the chat template",
        )
    return list(spans)


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
