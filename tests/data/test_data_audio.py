"""Decoded audio equals transformers' own loader; damaged, long and hostile files are refused; rows that name audio."""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers.audio_utils import load_audio as load_audio_of_transformers

from megatron_vlm.data import audio as audio_module
from megatron_vlm.data import images
from megatron_vlm.data.audio import load_audio
from megatron_vlm.data.audio_files import mp3_frames, ogg_is_chained
from megatron_vlm.data.conversation import AudioPart, AudioSource, Conversation, ImagePart, ImageSource, TextPart
from megatron_vlm.data.describe import check_rows
from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import ConfigError, DataError
from tests.data.rows import assistant, audio, image, row, user
from tests.data.sounds import encoded, tone
from tests.versions import needs_transformers_5_23

FOLDER = Path("/data/set")
RATE = 16000
KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAVEX", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("MP3", "MPEG_LAYER_III"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]


def load(data: bytes, most_samples: int = 30 * RATE) -> np.ndarray:
    return load_audio(AudioSource(data=data), "rows.jsonl:7", UrlAccess.NONE, RATE, most_samples)


def refusal(data: bytes, most_samples: int = 30 * RATE) -> str:
    with pytest.raises(DataError) as raised:
        load(data, most_samples)
    assert raised.value.where == "rows.jsonl:7" and "\n" not in str(raised.value) and " at 0x" not in str(raised.value)
    return str(raised.value)


@needs_transformers_5_23
@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (16000, 2), (48000, 1), (24000, 2), (8000, 1)])
def test_samples_equal_those_of_transformers(tmp_path: Path, kind: str, subtype: str, rate: int, channels: int) -> None:
    """One channel at the asked rate, bit for bit; what is cut from such a file is noticed."""
    data = encoded(tone(1.23, rate, channels), kind, rate, subtype=subtype)
    path = tmp_path / f"a.{kind[:3].lower()}"
    path.write_bytes(data)
    theirs = load_audio_of_transformers(str(path), sampling_rate=RATE, backend="soundfile")
    source = AudioSource(path=path)
    for ours in (load(data), load_audio(source, "row", UrlAccess.NONE, RATE, 30 * RATE)):
        assert ours.dtype == np.float32 and np.array_equal(ours, theirs)
    for fraction in (0.999, 0.7, 0.3):
        assert any(
            reason in refusal(data[: int(fraction * len(data))])
            for reason in ("ends before its last sample", "cannot be decoded", "has no samples")
        )


def test_other_rates_that_no_processor_takes() -> None:
    assert len(load(encoded(tone(1, 44100), rate=44100))) == RATE
    assert len(load(encoded(tone(0.5, 11025), rate=11025))) == RATE // 2


def test_files_that_are_no_audio(tmp_path: Path) -> None:
    assert "cannot be decoded (LibsndfileError: Format not recognised.)" in refusal(b"")
    assert "cannot be decoded" in refusal(b"no audio at all")
    assert "has no samples" in refusal(encoded(np.zeros((0, 1))))
    assert "a file of the kind AIFF PCM_16" in refusal(encoded(tone(0.1), "AIFF"))
    for number in (np.nan, np.inf):
        assert "not finite" in refusal(encoded(np.append(tone(0.1), [[number]], axis=0), subtype="FLOAT"))
    with pytest.raises(DataError, match=r"audio .*nothing.wav does not exist \[row\]"):
        load_audio(AudioSource(path=tmp_path / "nothing.wav"), "row", UrlAccess.NONE, RATE, RATE)
    (tmp_path / "dir.wav").mkdir()
    with pytest.raises(DataError, match=r"audio .*dir.wav is a directory \[row\].*name a file in it"):
        load_audio(AudioSource(path=tmp_path / "dir.wav"), "row", UrlAccess.NONE, RATE, RATE)
    with pytest.raises(DataError, match=r"audio http://a.b/c.wav is a URL \[row\].*data.allow_urls"):
        load_audio(AudioSource(url="http://a.b/c.wav"), "row", UrlAccess.NONE, RATE, RATE)


def test_clips_past_the_limit_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, longer = (encoded(np.zeros(length), rate=48000) for length in (48000, 48001))
    assert len(load(exact, RATE)) == RATE
    hours = encoded(np.zeros(3600 * 8000), "FLAC", 8000)
    claims = bytearray(encoded(tone(0.1), "FLAC"))
    claims[22:26] = struct.pack(">I", 2**31)  # samples, in a file of a few kilobytes
    many = encoded(np.zeros((5000, 8)), "FLAC")
    unknown = bytearray(encoded(tone(0.1), "FLAC"))
    unknown[21] &= 0xF0
    unknown[22:26] = bytes(4)
    assert len(hours) < 2**20
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("the clip was decoded"))
    assert "takes 1.00002 seconds, more than the 1 that a clip may have" in refusal(longer, RATE)
    assert "takes 3600 seconds, more than the 30" in refusal(hours)
    assert "takes 134218 seconds, more than the 30" in refusal(bytes(claims))
    assert "does not say how long it is" in refusal(bytes(unknown))
    monkeypatch.setattr(audio_module, "MAX_AUDIO_VALUES", 39_999)
    assert "5000 samples in 8 channels, more than 39999" in refusal(many)
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 100)
    assert "larger than 100 bytes" in refusal(exact)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_files_after_each_other(subtype: str) -> None:
    """libsndfile reads the first of them."""
    data = encoded(tone(1), "OGG", subtype=subtype)
    assert len(load(data)) == RATE
    for chained in (data + data, data + encoded(tone(2), "OGG", subtype=subtype)):
        assert "is several Ogg streams after each other, of which only the first would be heard" in refusal(chained)


def test_ogg_streams_side_by_side_are_not_chained() -> None:
    """They all begin before any goes on."""

    def page(kind: int, segments: bytes, body: bytes = b"") -> bytes:
        return b"OggS\0" + bytes([kind]) + bytes(20) + bytes([len(segments)]) + segments + body

    begin, end, held = page(2, b"\3", b"abc"), page(4, b"\0"), page(0, b"\40", page(2, b"").ljust(32))
    assert not ogg_is_chained(begin + begin + held + held + end + end)
    assert ogg_is_chained(begin + begin + held + end + end + begin)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_files_without_a_length(mode: str) -> None:
    """libsndfile estimates it from the first frame, and reads no more than that."""
    loud_then_silent = np.concatenate([tone(0.5), np.zeros((4 * RATE, 1))])
    data = encoded(loud_then_silent, "MP3", bitrate_mode=mode, compression_level=0.5)
    first = mp3_frames(data, 0)
    assert first.says_length and not first.ends_early
    assert len(load(data)) == len(loud_then_silent)
    assert len(load(b"ID3\4\0\0\0\0\1\0" + bytes(128) + data + b"TAG" + bytes(125))) == len(loud_then_silent)
    second = data.index(data[:2], 4)
    without = data[second:]
    if mode == "VARIABLE":
        assert "does not say how long it is, so that only 0." in refusal(without)
    else:
        assert abs(len(load(without)) - len(loud_then_silent)) < 3000
        assert "ends before its last sample" in refusal(without[:-10])


TAG = b"ID3\4\0\0\0\0\1\0" + bytes(128)
TAG_WITH_FOOTER = b"ID3\4\0\x10\0\0\1\0" + bytes(128) + b"3DI\4\0\x10\0\0\1\0"


@pytest.mark.parametrize("tags", [b"", TAG, TAG + TAG, TAG + TAG + TAG])
def test_mp3_files_cut_behind_tags(tags: bytes) -> None:
    data = encoded(tone(2), "MP3")
    assert len(load(tags + data)) == 2 * RATE
    assert "ends before its last sample" in refusal(tags + data[: len(data) // 2])


def test_mp3_frames_behind_tags() -> None:
    data = encoded(tone(2), "MP3")
    plain = mp3_frames(data, RATE * 9)
    for tags in (TAG_WITH_FOOTER, TAG + TAG_WITH_FOOTER, TAG_WITH_FOOTER + TAG):
        assert mp3_frames(tags + data, RATE * 9) == plain
        assert mp3_frames(tags + data[:-10], RATE * 9).ends_early
    assert mp3_frames(data + TAG + data, RATE * 9).samples > 2 * plain.samples
    assert "would be heard" in refusal(data + TAG + data)


def test_mp3_files_without_a_frame_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libsndfile finds by searching is no proof that nothing is missing."""
    data = encoded(tone(2), "MP3")
    assert mp3_frames(TAG + bytes(7) + data, RATE).samples == 0
    monkeypatch.setattr("megatron_vlm.data.audio_files._end_of_id3", lambda *_: 1)
    assert "has no MP3 frame where its first one belongs" in refusal(data)


def test_wav_files_written_to_a_pipe() -> None:
    data = bytearray(encoded(tone(0.1)))
    data[40:44] = b"\xff" * 4
    assert len(load(bytes(data))) == RATE // 10


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_missing_packages_are_named_at_once(
    make_gemma4_reader: Callable[..., RowReader], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every clip would be a bad row; rows without audio need no package."""
    monkeypatch.setitem(sys.modules, name, None)
    rows = [row(user("a"), assistant("b")), row(user(audio("a.wav")), assistant("b"))]
    assert not make_gemma4_reader(rows[:1]).read(0, 0).bad
    with pytest.raises(ConfigError, match=r"need the packages soundfile and soxr.*rows.jsonl:2.*pip install") as raised:
        make_gemma4_reader(rows)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setattr("megatron_vlm.data.rows.ROWS_PEEKED_FOR_IMAGES", 1)
    reader = make_gemma4_reader(rows)
    for late in (lambda: reader.read(0, 1), lambda: check_rows(reader)):
        with pytest.raises(ConfigError, match="need the packages soundfile and soxr"):
            late()


def parse(content: dict[str, Any]) -> Conversation:
    return parse_row(json.dumps(content), "rows.jsonl:7", FOLDER)


SOUND = encoded(tone(0.1))
TEXT = base64.b64encode(SOUND).decode()
FILE, INLINE = AudioPart(AudioSource(path=FOLDER / "a.wav")), AudioPart(AudioSource(data=SOUND))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "audio", "audio": "a.wav"}, FILE),
        ({"type": "audio", "audio": "/data/set/a.wav", "text": None}, FILE),
        ({"type": "audio", "path": "a.wav"}, FILE),
        ({"type": "audio", "url": "file:///data/set/a.wav"}, FILE),
        ({"type": "audio", "audio": {"path": "a.wav", "bytes": None}}, FILE),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, FILE),
        ({"type": "audio", "url": "https://a.b/c.wav"}, AudioPart(AudioSource(url="https://a.b/c.wav"))),
        ({"type": "audio", "base64": TEXT}, INLINE),
        ({"type": "audio", "audio": TEXT}, INLINE),
        ({"type": "audio", "audio": {"bytes": TEXT, "path": "a.wav"}}, INLINE),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{TEXT}"}}, INLINE),
        ({"type": "input_audio", "input_audio": {"data": TEXT, "format": "wav"}}, INLINE),
        ({"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{TEXT}"}}, INLINE),
    ],
)
def test_audio_parts(part: dict[str, Any], expected: AudioPart) -> None:
    parsed = parse(row(user(part, "What?"), assistant("a")))
    assert parsed.messages[0].content == (expected, TextPart("What?"))
    assert parsed.audio == [expected.source] and parsed.images == parsed.videos == []
    assert not parsed.unknown_keys


@pytest.mark.parametrize(
    "listed", [{"audio": "a.wav"}, {"audios": ["a.wav"]}, {"audio": {"path": "a.wav"}}, {"audios": [{"url": "a.wav"}]}]
)
def test_audio_beside_the_turns(listed: dict[str, Any]) -> None:
    for content in ("<audio>\nWhat?", [{"type": "audio"}, {"type": "text", "text": "What?"}]):
        assert parse({"messages": [{"role": "user", "content": content}], **listed}).messages[0].content == (
            FILE,
            TextPart("What?"),
        )
    chosen = {"messages": [user({"type": "audio", "index": 0}, "a", {"type": "audio", "index": 0})], **listed}
    assert parse(chosen).messages[0].content == (FILE, TextPart("a"), FILE)


def test_audio_and_images_beside_the_turns() -> None:
    parsed = parse(
        {
            "conversations": [{"from": "human", "value": "<audio><image>\n<audio> and"}, {"from": "gpt", "value": "a"}],
            "image": "0.png",
            "audio": ["a.wav", "b.wav"],
        }
    )
    second = AudioPart(AudioSource(path=FOLDER / "b.wav"))
    assert parsed.messages[0].content == (FILE, ImagePart(ImageSource(FOLDER / "0.png")), second, TextPart(" and"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}], "audio": "a.wav"}, "0 audio placeholders but 1 audios"),
        ({"messages": [{"role": "user", "content": "<audio>"}]}, "1 audio placeholders but 0 audios"),
        ({"messages": [{"role": "user", "content": "<audio>"}], "audios": ["a", "b"]}, "1 audio placeholders but 2"),
        ({"messages": [{"role": "user", "content": "<audio>"}], "audio": "a", "audios": ["b"]}, "`audios` and `audio`"),
        ({"messages": [{"role": "user", "content": "a"}], "audio_path": "a.wav"}, "list its clips under `audios`"),
        ({"messages": [{"role": "user", "content": "a"}], "Audios": ["a.wav"]}, "if it means 'audios'"),
        ({"messages": [{"role": "user", "content": "a", "audio": "a.wav"}]}, "list it beside the messages"),
        (row(user({"type": "audio"})), "1 audio placeholders but 0 audios"),
        (row(user({"type": "audio", "audio": "a", "url": "b"})), "audio part has `audio` and `url`"),
        (row(user({"type": "audio", "audio": 3})), "not audio: '3'"),
        (row(user({"type": "audio", "base64": "??"})), "not base64"),
        (row(user({"type": "audio", "audio": "data:audio/wav,abc"})), "data URI is not base64"),
        (row(user({"type": "audio", "audio": "a", "sampling_rate": 8000})), "an audio part has 'sampling_rate'"),
        (row(user({"type": "audio", "audio": {"path": "a", "start": 3}})), "a clip of audio has 'start'"),
        (row(user({"type": "audio", "audio": {"array": [0.1], "sampling_rate": 8000}})), "a clip of audio has 'array'"),
        (row(user({"type": "input_audio", "input_audio": {"data": TEXT, "bytes": TEXT}})), "has `data` and `bytes`"),
        (row(user({"type": "input_audio", "input_audio": {"data": TEXT, "url": "a"}})), "has `data` and `url`"),
        (row(user({"type": "input_audio", "input_audio": {"data": TEXT, "path": "a"}})), "has `data` and `path`"),
        (row(user({"type": "audio", "audio": {"url": "a", "path": "b"}})), "a clip of audio has `url` and `path`"),
        (row(user({"type": "audio", "audio": {"bytes": TEXT, "url": "a"}})), "has `bytes` and `url`"),
        (row(user({"type": "audio", "audio": {"path": "a", "base64": TEXT}})), "a clip of audio has 'base64'"),
        (row(user({"type": "audio", "path": "a", "bytes": TEXT})), "an audio part has 'bytes'"),
        ({**row(user({"type": "audio"})), "audios": [{"url": "a", "path": "b"}]}, "has `url` and `path`"),
        (row(user({"type": "audio", "index": 1})), "row lists 0 audios"),
    ],
)
def test_refusals_name_the_row(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse(content)
    assert message in str(raised.value) and "[rows.jsonl:7]" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("make", ["make_reader", "make_mistral_reader", "make_qwen_reader"])
def test_models_without_audio(make: str, request: pytest.FixtureRequest) -> None:
    make_reader: Callable[..., RowReader] = request.getfixturevalue(make)
    loaded = make_reader([row(user(image("0.png"), audio("a.wav")), assistant("b"))]).read(0, 0)
    assert loaded.problem and "the row has audio, which this model does not take" in loaded.problem
