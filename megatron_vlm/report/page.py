"""Parts of an HTML page that needs nothing else: style, charts (SVG) and images (data URIs) are inside it.

There is no script but what a caller puts in, and no address is fetched. Every text is escaped here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megatron_vlm.report.style import STYLE

_THUMBNAIL_PIXELS = 192
Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Figure:
    """A headline number: `passed` colours it (None leaves it neutral), `note` says what it is measured against."""

    label: str
    value: str
    note: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A question about an image, a clip of audio or both, the expected answer and the model's."""

    image_path: Path | None
    question: str
    answer: str
    prediction: str
    note: str = ""
    audio_path: Path | None = None


def page(title: str, parts: Iterable[str]) -> str:
    """Put the parts that are not empty together."""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
    return text.encode(errors="backslashreplace").decode()  # names of files may hold halves of characters


def header(title: str, *lines: str) -> str:
    """The title, and sentences below it."""
    body = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    return f"<header><h1>{escape(title)}</h1>{body}</header>"


def section(heading: str, body: str) -> str:
    """A part of the page under a heading; nothing without a body."""
    return f"<section><h2>{escape(heading)}</h2>{body}</section>" if body else ""


def figure_cards(figures: Sequence[Figure]) -> str:
    """Headline numbers beside each other."""
    cards = []
    for figure in figures:
        state = {True: " passed", False: " failed", None: ""}[figure.passed]
        sign = {True: "✓ ", False: "✗ ", None: ""}[figure.passed]
        note = f'<div class="note">{sign}{escape(figure.note)}</div>' if figure.note or sign else ""
        value, label = escape(figure.value), escape(figure.label)
        cards.append(
            f'<div class="card{state}"><div class="label">{label}</div><div class="value">{value}</div>{note}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def chart_figure(chart: str, caption: str, wide: bool = False) -> str:
    """A chart with its caption; `caption` is HTML."""
    return f"<figure{' class=wide' if wide else ''}>{chart}<figcaption>{caption}</figcaption></figure>"


def chart_grid(figures: Sequence[str]) -> str:
    """Charts in three columns; wide ones take a row."""
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def table(rows: Rows) -> str:
    """A table whose head is the keys of the first row; nothing without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in rows[0]) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, text: str) -> str:
    """Text as it is, behind a line that opens it; nothing without text."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def bullets(lines: Sequence[str]) -> str:
    """A list of lines; nothing without lines."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def sample_grid(samples: Sequence[Sample]) -> str:
    """Samples in their order, each marked as right or wrong."""
    cells = []
    for sample in samples:
        correct = sample.prediction == sample.answer
        verdict = "✓" if correct else f"✗ expected “{escape(sample.answer)}”"
        note = f'<div class="note">{escape(sample.note)}</div>' if sample.note else ""
        media = ""
        if sample.image_path is not None:
            media += f'<img src="{image_data_uri(sample.image_path)}" alt="{escape(sample.question, quote=True)}">'
        if sample.audio_path is not None:
            media += f'<audio controls src="{audio_data_uri(sample.audio_path)}"></audio>'
        cells.append(
            f'<figure class="sample {"right" if correct else "wrong"}">{media}'
            f'<figcaption><div class="question">{escape(sample.question)}</div>'
            f'<div class="prediction">{escape(sample.prediction) or "(nothing)"} <span>{verdict}</span></div>{note}'
            "</figcaption></figure>"
        )
    return f'<div class="samples">{"".join(cells)}</div>' if cells else ""


def image_data_uri(path: Path) -> str:
    """Return the image as a PNG data URI, made smaller if a side is longer than 192 pixels."""
    from PIL import Image  # only pages with samples need it

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def audio_data_uri(path: Path) -> str:
    """Return a file of audio as a data URI, as it is."""
    return f"data:audio/{path.suffix[1:].lower()};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
