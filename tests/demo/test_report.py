"""The HTML report: well-formed, self-contained, and safe with whatever text a run produced."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from megatron_vlm.report.chart import line_chart
from megatron_vlm.report.run_report import Figure, Sample, image_data_uri, read_metrics, write_report

VOID_TAGS = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Collects tags, text and addresses, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 5.0 / step, "lr": 1e-3, "grad_norm": 1.0} for step in range(1, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def page(tmp_path, metrics):
    image = tmp_path / "image.png"
    Image.new("RGB", (96, 96), (10, 20, 30)).save(image)
    path = write_report(
        tmp_path / "new" / "report.html",
        title=HOSTILE,
        metrics_jsonl=metrics,
        config_yaml=f"seed: 1 # {HOSTILE}",
        layout_rows=[{"steps": "1 to 30", "ranks": 2}, {"steps": HOSTILE, "ranks": 4}],
        samples=[Sample(image, HOSTILE, "red", "red"), Sample(image, "What?", "red", HOSTILE, "note")],
        figures=[Figure("Exact match", "97 %", "at least 90 %", True), Figure("Other", "1", "bar", False)],
        marks={30: HOSTILE},
        tables={"Time": [{"phase": "draw", "seconds": 1.5}]},
    )
    return path.read_text(encoding="utf-8")


def test_report_fetches_nothing_and_runs_nothing(page):
    parsed = Page(page)
    assert len(parsed.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert not re.search(r"@import|url\(|https?://", page)


def test_report_shows_text_as_text(page):
    parsed = Page(page)
    # Title (twice), settings, layout, question, prediction, mark.
    assert parsed.text.count(HOSTILE) == 7


def test_report_marks_right_and_wrong_answers(page):
    assert page.count('class="sample right"') == 1
    assert page.count('class="sample wrong"') == 1
    assert 'class="card passed"' in page and 'class="card failed"' in page


def test_charts_are_xml_and_draw_what_was_logged(page):
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == 3  # loss, gradient norm, learning rate
    assert all(ElementTree.fromstring(chart).tag == "svg" for chart in charts)


def test_an_older_report_is_replaced_whole(tmp_path, metrics):
    path = tmp_path / "report.html"
    path.write_text("older", encoding="utf-8")
    write_report(path, "Title", metrics, "", [])
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(tmp_path.glob("*.partial"))


def test_evaluations_are_dots_in_the_loss_curve(tmp_path, metrics):
    evaluations = tmp_path / "evaluations.jsonl"
    evaluations.write_text('{"step": 20, "loss": 0.5}\n{"step": 40, "loss": 0.25}\n', encoding="utf-8")
    path = write_report(tmp_path / "a.html", "Title", metrics, "", [], evaluations_jsonl=evaluations)
    assert path.read_text(encoding="utf-8").count('class="dot"') == 2
    path = write_report(tmp_path / "b.html", "Title", metrics, "", [], evaluations_jsonl=tmp_path / "none.jsonl")
    assert path.read_text(encoding="utf-8").count('class="dot"') == 0


def test_metrics_of_a_resumed_and_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "eval_loss": 9}, {"step": 2, "loss": 1}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo', encoding="utf-8")
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 3), (2, 1)]


def test_large_images_are_made_small_and_others_keep_their_pixels(tmp_path):
    for size, shown in (((600, 300), (192, 96)), ((48, 48), (48, 48))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "image.png")
        encoded = image_data_uri(tmp_path / "image.png").split(",", 1)[1]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.size == shown
    with Image.open(tmp_path / "image.png") as original, Image.open(io.BytesIO(base64.b64decode(encoded))) as kept:
        assert original.tobytes() == kept.tobytes()


def polyline(chart: str) -> list[tuple[float, float]]:
    points = ElementTree.fromstring(chart).find("polyline[@class='smooth']").get("points")
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_chart_places_points_in_proportion():
    points = polyline(line_chart([0, 5, 10], [0.0, 5.0, 10.0], "x", 400, 200))
    (x0, y0), (x1, y1), (x2, y2) = points
    # Coordinates are written with one decimal.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y2 < y0, "larger values are higher up"


def test_chart_uses_a_logarithmic_axis_only_where_allowed_and_needed():
    (_, y0), (_, y1), (_, y2) = polyline(line_chart([0, 1, 2], [10.0, 1.0, 0.1], "x", 400, 200, allow_logarithmic=True))
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    (_, y0), (_, y1), (_, y2) = polyline(line_chart([0, 1, 2], [10.0, 1.0, 0.1], "x", 400, 200))
    assert y1 - y0 > 5 * (y2 - y1)


@pytest.mark.parametrize(
    "values", [[float("nan")] * 5, [1.0], [2.0] * 5, [0.0] * 5, [1.0, float("inf"), 3.0, 2.0, 1.0]]
)
def test_chart_survives_odd_values(values):
    chart = line_chart(range(len(values)), values, "loss", 400, 200, allow_logarithmic=True)
    assert "nan" not in chart and "inf" not in chart
    assert chart.startswith(("<svg", '<p class="empty">'))
