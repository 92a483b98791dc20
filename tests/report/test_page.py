"""Pages and charts: well-formed, self-contained, and safe with whatever text a run produced."""

from __future__ import annotations

import base64
import io
import random
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from megatron_vlm.report import page
from megatron_vlm.report.chart import line_chart
from megatron_vlm.report.page import Figure, Sample, image_data_uri
from tests.report.parsed_page import HOSTILE, ParsedPage


@pytest.fixture
def hostile(tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (96, 96), (10, 20, 30)).save(image)
    chart = line_chart([(0, 1.0), (10, 2.0)], HOSTILE, 960, 200, {5: HOSTILE})
    parts = [
        page.header(HOSTILE, HOSTILE),
        page.figure_cards([Figure(HOSTILE, HOSTILE, HOSTILE, True), Figure("Other", "1", "bar", False)]),
        page.section(HOSTILE, page.chart_grid([page.chart_figure(chart, "caption")])),
        page.table([{"steps": "1 to 30", HOSTILE: 2}, {"steps": HOSTILE, HOSTILE: 4}]),
        page.sample_grid([Sample(image, HOSTILE, "red", "red"), Sample(image, "What?", "red", HOSTILE, HOSTILE)]),
        page.folded(HOSTILE, HOSTILE),
        page.bullets([HOSTILE, "half a character: \udce9"]),
    ]
    return page.page(HOSTILE, parts)


def test_a_page_fetches_nothing_and_runs_nothing(hostile):
    parsed = ParsedPage(hostile)
    assert len(parsed.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert not re.search(r"@import|url\(|https?://", hostile)


def test_text_is_shown_as_text(hostile):
    # Title, header (2), card (3), section, mark, table (2), sample (3), folded (2), bullet; attributes are no text.
    assert ParsedPage(hostile).text.count(HOSTILE) == 16
    assert "\\udce9" in hostile and hostile.encode()


def test_right_and_wrong_answers_are_marked(hostile):
    assert hostile.count('class="sample right"') == 1
    assert hostile.count('class="sample wrong"') == 1
    assert 'class="card passed"' in hostile and 'class="card failed"' in hostile


def test_parts_without_content_are_left_out():
    empty = [page.figure_cards([]), page.table([]), page.sample_grid([]), page.bullets([]), page.folded("Text", "")]
    assert not any(empty) and page.section("Nothing", page.chart_grid([])) == ""


def test_large_images_are_made_small_and_others_keep_their_pixels(tmp_path):
    for size, shown in (((600, 300), (192, 96)), ((48, 48), (48, 48))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "image.png")
        encoded = image_data_uri(tmp_path / "image.png").split(",", 1)[1]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.size == shown
    with Image.open(tmp_path / "image.png") as original, Image.open(io.BytesIO(base64.b64decode(encoded))) as kept:
        assert original.tobytes() == kept.tobytes()


def polyline(chart: str, name: str = "smooth") -> list[tuple[float, float]]:
    points = ElementTree.fromstring(chart).find(f"polyline[@class='{name}']").get("points")
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_chart_places_points_in_proportion():
    points = polyline(line_chart([(0, 0.0), (5, 5.0), (10, 10.0)], "x", 400, 200))
    (x0, y0), (x1, y1), (x2, y2) = points
    # Coordinates are written with one decimal.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y2 < y0, "larger values are higher up"


def test_chart_uses_a_logarithmic_axis_only_where_allowed_and_needed():
    points = [(0, 10.0), (1, 1.0), (2, 0.1)]
    (_, y0), (_, y1), (_, y2) = polyline(line_chart(points, "x", 400, 200, allow_logarithmic=True))
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    (_, y0), (_, y1), (_, y2) = polyline(line_chart(points, "x", 400, 200))
    assert y1 - y0 > 5 * (y2 - y1)


def test_a_second_quantity_lies_within_the_axes():
    chart = line_chart([(1, 1.0), (10, 0.5)], "loss", 400, 200, second=[(5, 3.0), (12, 4.0)])
    root = ElementTree.fromstring(chart)
    circles = [(float(each.get("cx")), float(each.get("cy"))) for each in root.iter("circle")]
    assert circles == polyline(chart, "second") and all(0 < x < 400 and 0 < y < 200 for x, y in circles)
    assert [title.text for title in root.iter("title")] == ["step 5: 3", "step 12: 4"]


def test_many_points_keep_their_peaks_and_both_ends():
    generator = random.Random(1)
    points = [(step, 1 + generator.random()) for step in range(100_000)]
    points[54_321] = (54_321, 30.0)
    chart = line_chart(points, "norm", 960, 320, smoothing_points=2500)
    raw, smooth = polyline(chart, "raw"), polyline(chart)
    assert len(raw) <= 1500 and len(smooth) <= 1500
    assert raw[0][0] == 58.0 and raw[-1][0] == 944.0
    peak_x, peak_y = min(raw, key=lambda place: place[1])
    assert peak_x == pytest.approx(58 + 886 * 54_321 / 99_999, abs=0.1)
    assert peak_y == pytest.approx(18.0, abs=0.1), "30 is the top of the axis"
    middle = [y for _, y in smooth[100:-100]]
    assert max(middle) - min(middle) < 5, "the mean of 2,500 points is smooth"


def test_smoothing_is_the_centred_mean():
    points = [(step, float(value)) for step, value in enumerate([0, 3, 6, 0, 12])]
    averages = [(step, value) for step, value in enumerate([1.5, 3.0, 3.0, 6.0, 6.0])]
    smoothed = polyline(line_chart(points, "x", 400, 200, smoothing_points=3))
    # The axis is that of the points.
    low, high = (dict(polyline(line_chart(points, "x", 400, 200)))[x] for x in (58.0, 384.0))
    assert [y for _, y in smoothed] == pytest.approx(
        [low + (high - low) * value / 12 for _, value in averages], abs=0.1
    )


def test_texts_of_marks_do_not_overlap():
    chart = line_chart(
        [(0, 1.0), (100, 2.0)], "x", 960, 320, {0: "resumed", 2: "resumed", 60: "resumed", 99: "resumed"}
    )
    root = ElementTree.fromstring(chart)
    places = [float(text.get("x")) for text in root.iter("text") if text.get("class") == "mark-text"]
    assert len(places) == 2 and places[1] - places[0] > 100
    assert sum(line.get("class") == "mark" for line in root.iter("line")) == 4


@pytest.mark.parametrize(
    "values",
    [
        [float("nan")] * 5,
        [1.0],
        [2.0] * 5,
        [0.0] * 5,
        [1.0, float("inf"), 3.0, 2.0, 1.0],
        [1e300, -1e300, 1.0, 2.0],
        [5e-324, 1.0, 1e50],
        [1e-90, 1e90, 1.0],
        [1e16, 1e16 + 2],
        [-3.0, -3.0 - 1e-12],
    ],
)
@pytest.mark.parametrize("allow_logarithmic", [False, True])
def test_chart_survives_odd_values(values, allow_logarithmic):
    points = list(enumerate(values))
    chart = line_chart(points, "loss", 400, 200, allow_logarithmic=allow_logarithmic, second=points[:2])
    assert "nan" not in chart and "inf" not in chart
    assert chart.startswith(("<svg", '<p class="empty">'))
    if chart.startswith("<svg"):
        assert all(0 <= x <= 400 and 0 <= y <= 200 for x, y in polyline(chart))
        assert len(re.findall(r'class="axis"', chart)) < 20


def test_a_sample_may_have_a_clip_instead_of_an_image(tmp_path):
    clip = tmp_path / "a.flac"
    clip.write_bytes(b"fLaC")
    grid = page.sample_grid([Sample(None, "What is said?", "two", "two", audio_path=clip)])
    assert ParsedPage(grid).addresses == ["data:audio/flac;base64,ZkxhQw=="] and "<img" not in grid
