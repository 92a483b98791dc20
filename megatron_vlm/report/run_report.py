"""Writes a run as one HTML file: headline figures, loss curve, layout, sample answers, settings.

The file needs nothing else: style, charts (SVG) and images (data URIs) are inside, there is no script, and no address
is fetched.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from megatron_vlm.files.durable import replace_durably
from megatron_vlm.report.chart import line_chart
from megatron_vlm.report.style import STYLE

_THUMBNAIL_PIXELS = 192
# Key in metrics.jsonl -> heading of its small chart; keys that a run did not log are left out.
_SMALL_CHARTS = {
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "step_seconds": "Seconds per step",
}
_MAX_SMALL_CHARTS = 3
# A row of its own for models with experts.
_EXPERT_CHARTS = {
    "expert_imbalance": "Tokens of the busiest expert over the mean",
    "dead_experts": "Experts without tokens, worst layer",
    "load_balancing_loss": "Load-balancing loss",
}


@dataclass(frozen=True)
class Figure:
    """A headline number: `passed` colours it (None leaves it neutral), `note` says what it is measured against."""

    label: str
    value: str
    note: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Sample:
    """An image with its question, the expected answer and the model's."""

    image_path: Path
    question: str
    answer: str
    prediction: str
    note: str = ""


def write_report(
    path: Path,
    title: str,
    metrics_jsonl: Path,
    config_yaml: str,
    layout_rows: Sequence[Mapping[str, object]],
    samples: Sequence[Sample] = (),
    figures: Sequence[Figure] = (),
    *,
    subtitle: str = "",
    marks: Mapping[int, str] | None = None,
    evaluations_jsonl: Path | None = None,
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
) -> Path:
    """Writes the report atomically and returns its path.

    Args:
        path: The HTML file; an older report there is replaced.
        metrics_jsonl: One object per logged step, with at least `step` and `loss`.
        config_yaml: The settings of the run, shown as they are.
        layout_rows: Rows of the layout table; the keys of the first are its head.
        samples: Shown as a grid, in this order.
        figures: Shown as cards under the title.
        subtitle: One sentence under the title.
        marks: Step -> text of a dashed line in the loss curve.
        evaluations_jsonl: One object per evaluation, with `step` and `loss`; drawn as dots. May not exist.
        tables: Heading -> rows of a further table, in the form of `layout_rows`.
    """
    metrics = read_metrics(metrics_jsonl)
    evaluations = read_metrics(evaluations_jsonl) if evaluations_jsonl and evaluations_jsonl.exists() else []
    sections = [
        _header(title, subtitle),
        _figure_cards(figures),
        _section("Training", _charts(metrics, evaluations, marks or {})),
        *[_section(heading, _table(rows)) for heading, rows in (tables or {}).items()],
        _section("Layout", _table(layout_rows)) if layout_rows else "",
        _section("Samples", _sample_grid(samples)) if samples else "",
        _section("Settings", f"<details><summary>Configuration</summary><pre>{escape(config_yaml)}</pre></details>"),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, page)
    return path


def read_metrics(path: Path) -> list[dict]:
    """Returns the training steps (or evaluations) of a file of JSON lines in order of step.

    A step that was logged again after a resume counts as logged last. A half-written last line (of a run that was
    killed, or still writes) is left out.
    """
    rows: dict[int, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "step" in row and isinstance(row.get("loss"), int | float):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _header(title: str, subtitle: str) -> str:
    return f"<header><h1>{escape(title)}</h1>" + (f"<p>{escape(subtitle)}</p>" if subtitle else "") + "</header>"


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _figure_cards(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    cards = []
    for figure in figures:
        state = {True: " passed", False: " failed", None: ""}[figure.passed]
        sign = {True: "✓ ", False: "✗ ", None: ""}[figure.passed]
        note = f'<div class="note">{sign}{escape(figure.note)}</div>' if figure.note or sign else ""
        value, label = escape(figure.value), escape(figure.label)
        cards.append(
            f'<div class="card{state}"><div class="label">{label}</div><div class="value">{value}</div>{note}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _charts(metrics: Sequence[Mapping], evaluations: Sequence[Mapping], marks: Mapping[int, str]) -> str:
    """Draw the loss curve at full width, up to three small charts of what else was logged, and those of experts."""
    steps = [row["step"] for row in metrics]
    losses = [float(row["loss"]) for row in metrics]
    smoothing = max(1, len(losses) // 40)
    dots = [(row["step"], float(row["loss"])) for row in evaluations]
    loss = line_chart(steps, losses, "Loss over steps", 960, 320, marks, smoothing, allow_logarithmic=True, dots=dots)
    caption = "Loss over optimizer steps"
    caption += ", moving average over measured values" if smoothing > 1 else ""
    caption += "; dots: held-out data" if dots else ""
    figures = [f'<figure class="wide">{loss}<figcaption>{caption}</figcaption></figure>']
    figures += _small_charts(metrics, _SMALL_CHARTS)[:_MAX_SMALL_CHARTS] + _small_charts(metrics, _EXPERT_CHARTS)
    return f'<div class="charts">{"".join(figures)}</div>'


def _small_charts(metrics: Sequence[Mapping], headings: Mapping[str, str]) -> list[str]:
    """Draw one chart for each key that at least two steps logged."""
    figures = []
    for key, heading in headings.items():
        rows = [row for row in metrics if isinstance(row.get(key), int | float)]
        if len(rows) > 1:
            steps, values = [row["step"] for row in rows], [float(row[key]) for row in rows]
            chart = line_chart(steps, values, heading, 320, 170, smoothing_points=max(1, len(values) // 40))
            figures.append(f"<figure>{chart}<figcaption>{escape(heading)}</figcaption></figure>")
    return figures


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in rows[0]) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sample_grid(samples: Sequence[Sample]) -> str:
    cells = []
    for sample in samples:
        correct = sample.prediction == sample.answer
        verdict = "✓" if correct else f"✗ expected “{escape(sample.answer)}”"
        note = f'<div class="note">{escape(sample.note)}</div>' if sample.note else ""
        cells.append(
            f'<figure class="sample {"right" if correct else "wrong"}">'
            f'<img src="{image_data_uri(sample.image_path)}" alt="{escape(sample.question, quote=True)}">'
            f'<figcaption><div class="question">{escape(sample.question)}</div>'
            f'<div class="prediction">{escape(sample.prediction) or "(nothing)"} <span>{verdict}</span></div>{note}'
            "</figcaption></figure>"
        )
    return f'<div class="samples">{"".join(cells)}</div>'


def image_data_uri(path: Path) -> str:
    """Returns the image as a PNG data URI, made smaller if a side is longer than 192 pixels."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
