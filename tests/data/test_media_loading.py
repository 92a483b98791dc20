"""Rows that are measured, with media that have sizes and no contents, equal decoded ones."""

from __future__ import annotations

import copy
import http.server
import io
import math
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageFile

from megatron_vlm.data.audio import count_samples, load_audio
from megatron_vlm.data.conversation import AudioSource, ImageSource
from megatron_vlm.data.images import IMAGE_FORMATS, image_sides, load_image
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.row_lengths import ARRAYS, RowStatus
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import DataError
from megatron_vlm.families.gemma4 import prompt as gemma4
from tests.data.conftest import measure, read_rows, written
from tests.data.references import GEMMA4_VARIANTS, draw_pictures, gemma4_config
from tests.data.rows import CONVERSATIONS, assistant, audio, image, row, user, video
from tests.data.sounds import encoded, tone
from tests.data.test_data_videos import write_video
from tests.sizes import full

FAMILIES = ("builder", "tagged_builder", "qwen_builder", "mistral_builder")
SIZES = {"0": (20, 30), "1": (70, 25), "2": (48, 48), "3": (90, 7), "large": (300, 200), "thin": (1500, 5)}
PADDING = (RowStatus.BAD, RowStatus.TOO_LONG, RowStatus.EMPTY)


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes and kinds, videos and clips."""
    folder = draw_pictures(tmp_path_factory.mktemp("media"), SIZES)
    upright = Image.open(folder / "1.png")
    upright.save(folder / "turned.jpg", exif=with_orientation(6))
    (folder / "late.png").write_bytes(orientation_last(upright))
    for number in range(5):
        upright.save(folder / f"frame{number}.jpg", exif=with_orientation(8))
    write_video(folder / "a.mp4", "mpeg4", 45)
    write_video(folder / "turned.mp4", "mpeg4", 33, rotation=90)
    for name, seconds in {"short": 0.02, "a": 0.5, "b": 1.234}.items():
        (folder / f"{name}.wav").write_bytes(encoded(tone(seconds)))
    (folder / "c.flac").write_bytes(encoded(tone(0.7, 22050, 2), "FLAC", 22050))
    (folder / "d.mp3").write_bytes(encoded(tone(0.9, 44100), "MP3", 44100))
    return folder


def orientation_last(picture: Image.Image) -> bytes:
    """A PNG file whose orientation stands behind its pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=with_orientation(6))
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    return data[:start] + data[end:last] + data[start:end] + data[last:]


def sized(path: str, **size: int) -> dict[str, Any]:
    return {"type": "image", "image": path, **size}


VIDEO_FRAMES = [f"frame{number}.jpg" for number in range(5)]
ROWS: list[Any] = [
    *(row(*messages) for messages in CONVERSATIONS.values()),
    row(*(turn for name in SIZES for turn in (user(image(f"{name}.png"), "?"), assistant("Yes.")))),
    row(user(image("turned.jpg"), image("late.png"), image("1.png")), assistant("Turned.")),
    row(user(sized("large.png", max_pixels=600), sized("0.png", resized_height=40, resized_width=24)), assistant("b")),
    row(user(sized("large.png", min_pixels=20_000)), assistant("b")),
    row(user(video("a.mp4"), "What moves?"), assistant("A bar.")),
    row(user(video("turned.mp4", 5.0), image("2.png"), video(VIDEO_FRAMES, 2.0)), assistant("Bars.")),
    row(user(video([*VIDEO_FRAMES, "0.png"])), assistant("Of two sizes.")),
    row(user(audio("b.wav"), audio("short.wav"), "?", audio("a.wav")), assistant("Tones.")),
    row(user(audio("c.flac"), image("0.png"), audio("d.mp3")), assistant("Both.")),
    row(user("a"), {"role": "assistant", "content": " "}),
    row(user("a"), assistant("b"), user("c"), {"role": "assistant", "content": ""}),
    row(user("words"), assistant("b"), user("and more words " * 30, image("1.png")), assistant("d")),
    row(user("words " * 150), assistant("b")),
    row(user(image("nothing.png")), assistant("b")),
    row(user("<image> <|image_pad|> <end_of_turn> <|turn> </s>"), assistant("b")),
    row(user(image("https://localhost/a.png")), assistant("b")),
    "no JSON",
    row(user("a")),
]


@pytest.fixture(scope="module", params=[*FAMILIES, *GEMMA4_VARIANTS, "text-only"])
def any_builder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """A builder of each family."""
    if request.param == "text-only":
        return PromptBuilder(request.getfixturevalue("hf_path"), request.getfixturevalue("text_rules"))
    if request.param in GEMMA4_VARIANTS:
        path = written(tmp_path_factory, GEMMA4_VARIANTS[request.param])
        return PromptBuilder(path, gemma4.prompt_rules(gemma4_config(request.param)))
    found: PromptBuilder = request.getfixturevalue(request.param)
    return found


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let images and clips fail when they are decoded; MP3 has to be."""
    read = soundfile.SoundFile.read

    def read_mp3(file: soundfile.SoundFile, *arguments: Any, **options: Any) -> Any:
        assert file.format == "MP3", "a clip is decoded"
        return read(file, *arguments, **options)

    def load(picture: ImageFile.ImageFile) -> Any:
        assert picture.format == "PNG" and picture.size == (70, 25), "an image is decoded"  # late.png
        return load_pixels(picture)

    load_pixels = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(soundfile.SoundFile, "read", read_mp3)


@pytest.mark.parametrize(
    ("too_long", "drop_empty_answers"),
    [("drop", False), ("truncate", True), full("error", False), full("drop", True)],
)
def test_lengths_equal_those_of_samples(
    any_builder: PromptBuilder,
    media_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    too_long: str,
    drop_empty_answers: bool,
) -> None:
    builder = copy.copy(any_builder)
    builder.drop_empty_answers = drop_empty_answers
    statuses: set[int] = set()
    for seq_length in (4096, 160):
        settings = {"seq_length": seq_length, "too_long": too_long, "drop_empty_answers": drop_empty_answers}
        reader = read_rows(builder, media_folder, ROWS, **settings)
        with monkeypatch.context() as patch:
            no_decoding(patch)
            lengths = measure(reader)
            measured = [reader.measuring().read(0, number).sample for number in range(len(ROWS))]
        statuses |= {*lengths["status"].tolist()}
        for number in range(len(ROWS)):
            status = RowStatus(lengths["status"][number])
            if too_long == "error" and status == RowStatus.TOO_LONG:
                with pytest.raises(DataError, match=r"more than data\.seq_length"):
                    reader.read(0, number)
                continue
            loaded = reader.read(0, number)
            media = loaded.sample.media
            assert measured[number].media == media, ROWS[number]
            assert np.array_equal(measured[number].input_ids, loaded.sample.input_ids)
            assert np.array_equal(measured[number].trained, loaded.sample.trained)
            grids = [medium.grid for medium in media if medium.kind != "audio"]
            frames = [medium.grid[0] for medium in media if medium.kind == "audio"]
            found = {name: lengths[name][number] for name in ARRAYS if name != "status"}
            assert found == {
                "tokens": len(loaded.sample.input_ids),
                "patches": sum(math.prod(grid) for grid in grids),
                "patch_pairs": sum((height * width) ** 2 for count, height, width in grids for _ in range(count)),
                "audio_frames": sum(frames),
            }, ROWS[number]
            inputs = loaded.sample.media_inputs
            assert len(inputs.get("audio_features", ())) == sum(frames)
            if any(medium.kind != "audio" and medium.grid[1] != medium.grid[2] for medium in media):
                assert len(inputs["pixel_values"]) == found["patches"]
            assert (status == RowStatus.BAD) == loaded.bad
            assert (status == RowStatus.TOO_LONG) == loaded.too_long
            assert (status == RowStatus.TRUNCATED) == loaded.truncated
            assert (status in PADDING) == (not loaded.sample.trained.any())
    expected = {RowStatus.OK, RowStatus.BAD, RowStatus.TOO_LONG}
    expected |= {RowStatus.TRUNCATED} if too_long == "truncate" else set()
    if builder.rules.media is None and too_long == "truncate":
        expected -= {RowStatus.TRUNCATED}  # the row that could be cut has an image
    assert statuses == expected | ({RowStatus.EMPTY} if drop_empty_answers else set())


def test_images_of_urls_are_fetched(qwen_builder: PromptBuilder, media_folder: Path) -> None:
    handler = partial(QuietHandler, directory=str(media_folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        rows = [row(user(image(f"{address}/{name}"), "?"), assistant("Yes.")) for name in ("turned.jpg", "gone.jpg")]
        reader = read_rows(qwen_builder, media_folder, rows, allow_urls=True, allow_private_urls=True)
        lengths, decoded = measure(reader), reader.read(0, 0).sample
        server.shutdown()
    assert lengths["status"].tolist() == [RowStatus.OK, RowStatus.BAD]
    assert lengths["tokens"].tolist() == [len(decoded.input_ids), 1]
    assert lengths["patches"][0] == len(decoded.media_inputs["pixel_values"])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet."""


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_sides_equal_those_of_decoded_images(kind: str) -> None:
    """Also where the orientation tag turns them; Pillow writes it into four kinds of files."""
    picture = Image.new("RGB", (40, 60), (200, 30, 30))
    for number in range(9) if kind in ("JPEG", "PNG", "TIFF", "WEBP") else (0,):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"exif": with_orientation(number)} if number else {}))
        source = ImageSource(data=buffer.getvalue())
        decoded = load_image(source, "row", UrlAccess.NONE)
        assert image_sides(source, "row", UrlAccess.NONE) == (decoded.height, decoded.width)
    late = ImageSource(data=orientation_last(picture))
    assert image_sides(late, "row", UrlAccess.NONE) == (40, 60) and load_image(late, "row", UrlAccess.NONE).height == 40


def test_headers_are_refused_as_images_are(media_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same words, of what a header says."""
    sources = [
        ImageSource(data=b"no image"),
        ImageSource(path=media_folder / "nothing.png"),
        ImageSource(path=media_folder / "thin.png"),
        ImageSource(path=media_folder / "large.png"),
        ImageSource(url="https://localhost/a.png"),
    ]
    monkeypatch.setattr("megatron_vlm.data.images.MAX_IMAGE_PIXELS", 10_000)
    for source in sources:
        refusals = set()
        for read in (image_sides, load_image):
            with pytest.raises(DataError) as raised:
                read(source, "row", UrlAccess.NONE)
            refusals.add(re.sub("0x[0-9a-f]+", "", str(raised.value)))
        assert len(refusals) == 1, refusals


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2), (24000, 1)])
def test_samples_are_counted_as_decoded(kind: str, subtype: str, rate: int, channels: int) -> None:
    for seconds in (0.5, 1.23, 0.01003):
        data = encoded(tone(seconds, rate, channels), kind, rate, subtype=subtype)
        for content in (data, data[: len(data) * 2 // 3]):
            source = AudioSource(data=content)
            outcomes = []
            for read in (count_samples, lambda *given: len(load_audio(*given))):
                try:
                    outcomes.append(read(source, "row", UrlAccess.NONE, 16000, 30 * 16000))
                except DataError:
                    outcomes.append("bad")
            # A FLAC file that is cut off is found when it is decoded.
            assert outcomes[0] == outcomes[1] or (kind == "FLAC" and outcomes[1] == "bad"), (content is data, outcomes)
