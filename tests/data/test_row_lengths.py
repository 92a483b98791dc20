"""Lengths of rows from headers equal those of decoded samples; what changes one is part of a stored file's name."""

from __future__ import annotations

import copy
import dataclasses
import http.server
import io
import math
import pickle
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageFile

from megatron_vlm.data.array_files import node_folder
from megatron_vlm.data.audio import count_samples, load_audio
from megatron_vlm.data.conversation import AudioSource, ImageSource
from megatron_vlm.data.images import IMAGE_FORMATS, image_sides, load_image
from megatron_vlm.data.measure_rows import Chunk, measure_chunk
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.row_lengths import ARRAYS, RowLengths, RowStatus, find_row_lengths, lengths_files
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import DataError
from megatron_vlm.families.gemma4 import prompt as gemma4
from tests.data.conftest import read_rows, written
from tests.data.references import GEMMA4_VARIANTS, draw_pictures, gemma4_config
from tests.data.rows import CONVERSATIONS, assistant, audio, image, numbered_rows, row, user, video
from tests.data.sounds import encoded, tone
from tests.data.test_data_videos import write_video
from tests.sizes import full

Make = Callable[..., RowReader]
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


def measure(reader: RowReader) -> dict[str, np.ndarray]:
    """Lengths of the rows of the first source."""
    return dict(measure_chunk(reader.measuring(), Chunk(0, 0, reader.sources[0].num_rows, 0)))


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


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a temporary directory of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def stored(reader: RowReader) -> RowLengths:
    """The lengths of the rows of a reader's only source, measured and kept."""
    (file,) = lengths_files(reader)
    file.store(measure(reader))
    (found,) = find_row_lengths(reader)
    assert file.find() is not None
    return found


def test_stored_lengths_are_mapped_and_not_pickled(make_reader: Make) -> None:
    reader = make_reader(numbered_rows(300))
    found, measured = stored(reader), measure(reader)
    for name, kind in ARRAYS.items():
        array = getattr(found, name)
        assert np.array_equal(array, measured[name]) and array.dtype == kind
        assert not array.flags.owndata and not array.flags.writeable
    assert found.stored_at in Path("/proc/self/maps").read_text()
    pickled = pickle.dumps(found)
    assert len(pickled) < 1000 < found.tokens.nbytes
    assert np.array_equal(pickle.loads(pickled).tokens, found.tokens)
    assert found.count(RowStatus.OK) == 300


@pytest.mark.parametrize(
    ("settings", "is_another"),
    [
        ({}, False),
        ({"strict": True, "max_bad_fraction": 0.5, "num_workers": 7, "shuffle": False}, False),
        ({"too_long": "error"}, False),
        ({"too_long": "truncate"}, True),
        ({"seq_length": 127}, True),
        ({"allow_urls": True}, True),
        ({"drop_empty_answers": True}, True),
        ({"train_thinking": False}, True),
    ],
)
def test_settings_that_change_lengths_have_files_of_their_own(
    make_reader: Make, settings: dict[str, Any], is_another: bool
) -> None:
    rows = numbered_rows(3)
    before, after = (lengths_files(make_reader(rows, **given))[0].place for given in ({}, settings))
    assert (before != after) == is_another


def test_processors_have_files_of_their_own(
    hf_path: Path, rules: PromptRules, qwen_path: Path, qwen_rules: PromptRules, folder: Path, tmp_path: Path
) -> None:
    """By settings, limits, template, tokenizer and the family's rules; rows by what they are and where."""

    def place(path: Path, given: PromptRules, where: Path = folder, count: int = 3, **limits: int) -> Path:
        return lengths_files(read_rows(PromptBuilder(path, given, **limits), where, numbered_rows(count)))[0].place

    def changed(path: Path, name: str, change: Callable[[str], str]) -> Path:
        copied = shutil.copytree(path, tmp_path / f"{path.name} {len(list(tmp_path.iterdir()))}")
        text = (copied / name).read_text()
        (copied / name).write_text(change(text))
        assert (copied / name).read_text() != text
        return copied

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("tmp", "elsewhere"))
    places = [
        place(qwen_path, qwen_rules),
        place(qwen_path, qwen_rules, max_pixels=900),
        place(qwen_path, qwen_rules, min_pixels=90),
        place(qwen_path, qwen_rules, elsewhere),
        place(qwen_path, qwen_rules, count=4),
        place(changed(qwen_path, "chat_template.jinja", lambda text: text + " "), qwen_rules),
        place(changed(qwen_path, "tokenizer.json", lambda text: text + " "), qwen_rules),
        place(changed(qwen_path, "processor_config.json", lambda text: text.replace("1024", "1023")), qwen_rules),
        place(qwen_path, dataclasses.replace(qwen_rules, vocab_size=99_999)),
        place(hf_path, rules),
    ]
    assert len({*places}) == len(places)
    assert place(shutil.copytree(qwen_path, tmp_path / "copy"), qwen_rules) == places[0]


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty", "another"])
def test_files_of_no_use_are_named(make_reader: Make, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    reader = make_reader(numbered_rows(50))
    (file,) = lengths_files(reader)
    assert file.find() is None and not caplog.records
    stored(reader)
    content = bytearray(file.place.read_bytes())
    if damage == "bit":
        content[-9] ^= 4
    elif damage == "header":
        content[20] ^= 0x80
    elif damage == "another":
        content = bytearray(Path(stored(make_reader(numbered_rows(50), seq_length=90)).stored_at).read_bytes())
    file.place.write_bytes(content[: {"cut": -8, "empty": 0}.get(damage, len(content))])
    reader = make_reader(numbered_rows(50))
    assert file.find() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(file.place) in line and "measured anew" in line
    assert damage != "another" or "made for another settings" in line
    with pytest.raises(DataError, match=r"gone from this node.*start again"):
        find_row_lengths(reader)
    stored(reader)


def test_lengths_of_past_contents_go(make_reader: Make) -> None:
    """Those of other settings stay."""
    kept = [stored(make_reader(numbered_rows(5), **given)).stored_at for given in ({}, {"seq_length": 99})]
    assert all(Path(place).is_file() for place in kept)
    after = stored(make_reader(numbered_rows(6))).stored_at
    assert [Path(place).is_file() for place in (*kept, after)] == [False, False, True]


@pytest.mark.parametrize("obstacle", ["read-only", "others may write", "disk full"])
def test_folder_of_no_use(make_reader: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    reader = make_reader(numbered_rows(3))
    measured = measure(reader)
    if obstacle == "read-only":
        monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    elif obstacle == "others may write":
        node_folder().mkdir()
        node_folder().chmod(0o777)
    else:
        monkeypatch.setattr("megatron_vlm.data.array_files.os.fsync", _full)
    with pytest.raises(DataError, match=r"lengths of rows, which data.packing needs, cannot be kept.*TMPDIR"):
        lengths_files(reader)[0].store(measured)
    assert not list(own_folder.rglob("*.partial*"))


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


LONG = row(user(image("0.png"), "one"), assistant("two"), user("three " * 90), assistant("four"))
MEASURED = [
    row(user(image("0.png"), "What?"), assistant("Red.")),
    row(user("words " * 99), assistant("b")),
    LONG,
    row(user(image("nothing.png")), assistant("b")),
    row(user("a"), {"role": "assistant", "content": ""}),
    row(user("a", image("1.png")), assistant("b"), user("c"), {"role": "assistant", "content": ""}),
]


def same(left: Any, right: Any) -> bool:
    plain = ("source", "row_name", "bad", "too_long", "truncated", "problem", "unknown_keys")
    return (
        all(getattr(left, name) == getattr(right, name) for name in plain)
        and np.array_equal(left.sample.input_ids, right.sample.input_ids)
        and np.array_equal(left.sample.trained, right.sample.trained)
        and left.sample.empty_answers == right.sample.empty_answers
        and left.sample.media == right.sample.media
        and all(torch.equal(left.sample.media_inputs[name], value) for name, value in right.sample.media_inputs.items())
    )


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_measured_rows_are_read_as_before(
    builder: PromptBuilder, folder: Path, monkeypatch: pytest.MonkeyPatch, too_long: str
) -> None:
    builder = copy.copy(builder)
    builder.drop_empty_answers = True
    reader = read_rows(builder, folder, MEASURED, too_long=too_long, drop_empty_answers=True)
    lengths = stored(reader)
    cut = RowStatus.TRUNCATED if too_long == "truncate" else RowStatus.TOO_LONG
    assert lengths.status.tolist() == [0, RowStatus.TOO_LONG, cut, RowStatus.BAD, RowStatus.EMPTY, 0]
    for number in range(len(MEASURED)):
        assert same(reader.read_measured(0, number, lengths), reader.read(0, number))
    monkeypatch.setattr("megatron_vlm.data.media_loading.load_image", lambda *_: pytest.fail("an image is decoded"))
    for number in np.flatnonzero(lengths.tokens == 1):
        assert reader.read_measured(0, int(number), lengths).sample.input_ids.shape == (1,)


def test_media_that_change_after_measuring(qwen_builder: PromptBuilder, folder: Path) -> None:
    reader = read_rows(qwen_builder, folder, MEASURED)
    lengths = stored(reader)
    assert lengths.status.tolist()[:4] == [0, RowStatus.TOO_LONG, RowStatus.TOO_LONG, RowStatus.BAD]
    picture, before = (folder / "0.png").read_bytes(), int(lengths.tokens[0])

    def refusal() -> str:
        with pytest.raises(DataError) as raised:
            reader.read_measured(0, 0, lengths)
        assert raised.value.where == f"{folder / 'rows.jsonl'}:1" and lengths.stored_at in str(raised.value)
        return str(raised.value)

    Image.new("RGB", (64, 30)).save(folder / "0.png")
    now = len(reader.read(0, 0).sample.input_ids)
    assert now != before and f"has {now} tokens, and had {before} when lengths were measured" in refusal()
    short = copy.copy(reader)
    short.settings = dataclasses.replace(reader.settings, seq_length=before)
    short_lengths = dataclasses.replace(lengths)
    with pytest.raises(DataError, match=f"has {now} tokens, and had {before}"):
        short.read_measured(0, 0, short_lengths)
    Image.new("RGB", (30, 20)).save(folder / "0.png")
    assert reader.read_measured(0, 0, lengths).sample.media
    (folder / "0.png").write_bytes(picture[:-40])
    assert "image file is truncated" in str(reader.read_measured(0, 0, lengths).problem)
    (folder / "nothing.png").write_bytes(picture)
    found = reader.read_measured(0, 3, lengths)
    assert found.bad and len(found.sample.input_ids) == 1
    assert found.problem and "could not be read when lengths were measured" in found.problem
