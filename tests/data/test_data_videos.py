"""Video files against transformers' own reader; every way in which rows name videos."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import load_video as load_video_of_transformers

from megatron_vlm.data import videos
from megatron_vlm.data.conversation import Conversation, ImagePart, ImageSource, TextPart, VideoPart, VideoSource
from megatron_vlm.data.describe import check_rows
from megatron_vlm.data.formats import parse_row
from megatron_vlm.data.media import Medium
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.videos import load_video
from megatron_vlm.errors import ConfigError, DataError
from tests.data.rows import assistant, row, user, video

av = pytest.importorskip("av")
Make = Callable[..., RowReader]
FOLDER = Path("/data/set")


def write_video(path: Path, codec: str, num_frames: int, rate: int = 10, rotation: int = 0) -> None:
    """Frames of 48 x 32 pixels whose red part tells their number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 48, 32
        stream.pix_fmt = {"ffv1": "yuv444p", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            picture = np.zeros((32, 48, 3), np.uint8)
            picture[:, : 2 + number] = (200, 30 + number, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "num_frames", "wanted"),
    [
        ("a.mp4", "libx264", 45, 9),
        ("a.mp4", "mpeg4", 7, 4),
        ("a.avi", "mjpeg", 3, 3),
        ("a.mp4", "libx264", 45, 4),
    ],
)
def test_files_give_the_frames_of_transformers(
    qwen_builder: PromptBuilder, qwen_path: Path, tmp_path: Path, name: str, codec: str, num_frames: int, wanted: int
) -> None:
    """Two a second where the row names no rate, at least four; ids and patches as the processor makes them."""
    write_video(tmp_path / name, codec, num_frames)
    fps = None if wanted != 4 or num_frames < 45 else 1
    line = json.dumps(row(user(video(name, fps), "What?"), assistant("A bar.")))
    conversation = parse_row(line, "rows.jsonl:1", tmp_path)
    read = load_video(conversation.videos[0], "rows.jsonl:1", False, qwen_builder.sample_frames)
    sample = qwen_builder.encode(conversation, [], [read])

    processor = AutoProcessor.from_pretrained(qwen_path, local_files_only=True)
    sampler = partial(processor.video_processor.sample_frames, fps=fps)
    frames, metadata = load_video_of_transformers(
        str(tmp_path / name), backend="pyav", sample_indices_fn=lambda metadata, **_: sampler(metadata)
    )
    assert len(frames) == wanted == len(read.frames)
    assert torch.equal(read.frames, torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert list(read.frames_indices) == metadata.frames_indices.tolist()
    assert read.frames_per_second == metadata.fps == 10
    messages = [user({"type": "video", "video": frames}, "What?"), assistant("A bar.")]
    options = {"do_sample_frames": False, "video_metadata": [dict(metadata)]}
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=options)
    assert sample.input_ids.tolist() == theirs["input_ids"][0]
    assert torch.equal(sample.media_inputs["pixel_values"], theirs["pixel_values_videos"])
    assert sample.media == [Medium("video", tuple(theirs["video_grid_thw"][0].tolist()))]


def test_containers_that_store_no_count(qwen_builder: PromptBuilder, tmp_path: Path) -> None:
    """Matroska does not say how many frames there are; the same frames come out as from a container that does."""
    write_video(tmp_path / "a.mkv", "ffv1", 45)
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.streams.video[0].frames == 0
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    read = load_video(VideoSource(tmp_path / "a.mkv"), "row", False, qwen_builder.sample_frames)
    assert read.total_num_frames == len(frames) == 45
    assert list(read.frames_indices) == np.linspace(0, 44, 9).round().astype(int).tolist()
    expected = np.stack([frames[index] for index in read.frames_indices])
    assert np.array_equal(read.frames.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_videos_are_turned_upright(qwen_builder: PromptBuilder, tmp_path: Path, degrees: int) -> None:
    write_video(tmp_path / "lying.mp4", "mpeg4", 4)
    write_video(tmp_path / "turned.mp4", "mpeg4", 4, rotation=degrees)
    lying, turned = (
        load_video(VideoSource(tmp_path / name), "row", False, qwen_builder.sample_frames).frames
        for name in ("lying.mp4", "turned.mp4")
    )
    # PIL turns counter-clockwise, as the angle of the container's matrix counts.
    expected = [Image.fromarray(frame.permute(1, 2, 0).numpy()).rotate(degrees, expand=True) for frame in lying]
    assert np.array_equal(turned.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_processors_that_do_not_sample(qwen_builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = videos.VideoMetadata(total_num_frames=30, fps=10.0)
    assert len(qwen_builder.sample_frames(metadata, None)) == 6
    monkeypatch.setattr(qwen_builder.processor.video_processor, "do_sample_frames", False)
    assert qwen_builder.sample_frames(metadata, None).tolist() == list(range(30))
    assert len(qwen_builder.sample_frames(metadata, 3.0)) == 9
    monkeypatch.setattr(qwen_builder.processor.video_processor, "do_sample_frames", True)
    monkeypatch.setattr(qwen_builder.processor.video_processor, "fps", None)
    monkeypatch.setattr(qwen_builder.processor.video_processor, "num_frames", 5)
    assert len(qwen_builder.sample_frames(metadata, None)) == 5


def test_files_that_are_no_videos(make_qwen_reader: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(folder / "good.mp4", "mpeg4", 8)
    write_video(folder / "good.avi", "mpeg4", 8)
    for name in ("good.mp4", "good.avi"):
        data = (folder / name).read_bytes()
        (folder / name.replace("good", "cut")).write_bytes(data[: len(data) // 2])
    (folder / "dir.mp4").mkdir()
    (folder / "text.mp4").write_text("no video")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n")
    with av.open(str(folder / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 160), np.int16), layout="stereo")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    names = {
        "cut.avi": "cannot be decoded",
        "cut.mp4": "has no picture",
        "text.mp4": "cannot be decoded",
        "list.m3u8": "cannot be decoded",
        "sound.mkv": "has no picture",
        "missing.mp4": "does not exist",
        "dir.mp4": "dir.mp4 is a directory",
        "A" * 5000: "AAA... does not exist",
    }
    rows = [row(user(video(name)), assistant("b")) for name in [*names, "good.mp4"]]
    reader = make_qwen_reader(rows, max_bad_fraction=0.5)
    for number, reason in enumerate(names.values()):
        loaded = reader.read(0, number)
        assert loaded.bad and loaded.problem and reason in loaded.problem and "\n" not in loaded.problem
    assert not reader.read(0, len(names)).bad
    # A container that promises more than it holds.
    with pytest.raises(DataError, match=r"good.mp4 ends before its last frame \[row\]"):
        load_video(VideoSource(folder / "good.mp4"), "row", False, lambda metadata, fps: np.array([0, 9]))
    found = check_rows(reader)
    assert (found.videos, found.bad_rows) == (9, 3)
    monkeypatch.setattr(videos, "MAX_VIDEO_PIXELS", 4 * 32 * 48 - 1)
    problem = reader.read(0, len(names)).problem
    assert problem and "good.mp4 has 4 frames of 48 x 32 pixels, more than 6143 in all" in problem


def test_missing_package_is_named_at_once(make_qwen_reader: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every video file would be a bad row; lists of frames need no package."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find_spec(name))
    frames = row(user(video(["0.png"] * 2)), assistant("b"))
    assert not make_qwen_reader([frames]).read(0, 0).bad
    with pytest.raises(ConfigError, match=r"need the package av, which is not installed.*rows.jsonl:2.*\[video\]"):
        make_qwen_reader([frames, row(user(video("a.mp4")), assistant("b"))])
    monkeypatch.setattr("megatron_vlm.data.rows.ROWS_PEEKED_FOR_IMAGES", 1)
    reader = make_qwen_reader([frames, row(user(video("a.mp4")), assistant("b"))])
    for late in (lambda: reader.read(0, 1), lambda: check_rows(reader)):
        with pytest.raises(ConfigError, match="need the package av"):
            late()


def parse(content: dict[str, Any]) -> Conversation:
    return parse_row(json.dumps(content), "rows.jsonl:7", FOLDER)


def frames_at(*names: str, fps: float | None = None) -> VideoPart:
    return VideoPart(VideoSource(frames=tuple(ImageSource(FOLDER / name) for name in names), frames_per_second=fps))


FILE = VideoPart(VideoSource(path=FOLDER / "a.mp4"))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "video", "video": "a.mp4"}, FILE),
        ({"type": "video", "path": "a.mp4", "image": None, "text": None}, FILE),
        ({"type": "video", "url": "file:///data/set/a.mp4"}, FILE),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, FILE),
        ({"type": "video", "video": {"path": "a.mp4", "bytes": None}}, FILE),
        ({"type": "video", "video": {"video": ["0.png", "1.png"], "fps": 2}}, frames_at("0.png", "1.png", fps=2)),
        ({"type": "video", "video": {"video": ["0.png"], "fps": None}, "fps": 2}, frames_at("0.png", fps=2)),
        ({"type": "video", "video": ["0.png", "/data/set/1.png"]}, frames_at("0.png", "1.png")),
        ({"type": "video", "video": ["0.png", {"path": "1.png"}], "fps": 2}, frames_at("0.png", "1.png", fps=2)),
    ],
)
def test_video_parts(part: dict[str, Any], expected: VideoPart) -> None:
    parsed = parse(row(user(part, "What?"), assistant("a")))
    assert parsed.messages[0].content == (expected, TextPart("What?"))
    assert parsed.videos == [expected.source] and parsed.images == []


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"video": "a.mp4"}, FILE),
        ({"videos": ["a.mp4"]}, FILE),
        ({"video": ["0.png", "1.png"]}, frames_at("0.png", "1.png")),
        ({"videos": [["0.png", "1.png"]]}, frames_at("0.png", "1.png")),
        ({"videos": [{"video": ["0.png", "1.png"], "fps": 0.5}]}, frames_at("0.png", "1.png", fps=0.5)),
    ],
)
def test_videos_beside_the_turns(listed: dict[str, Any], expected: VideoPart) -> None:
    """Also with the marker of LLaVA's video rows, which write "<image>" for a video."""
    for marker in ("<video>", "<image>"):
        parsed = parse({"conversations": [{"from": "human", "value": f"{marker}\nWhat?"}], **listed})
        assert parsed.messages[0].content == (expected, TextPart("What?"))
    with pytest.raises(DataError, match="1 image placeholders but 0 images"):
        parse({"messages": [{"role": "user", "content": "<video>Is it an <image>?"}], **listed})


def test_images_and_videos_beside_the_turns() -> None:
    parsed = parse(
        {
            "conversations": [{"from": "human", "value": "<image>\n<video> and <image>"}],
            "images": ["0.png", "1.png"],
            "video": "a.mp4",
        }
    )
    first, second = (ImagePart(ImageSource(FOLDER / name)) for name in ("0.png", "1.png"))
    assert parsed.messages[0].content == (first, FILE, TextPart(" and "), second)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}], "video": "a.mp4"}, "0 video placeholders but 1 videos"),
        ({"messages": [{"role": "user", "content": "<video><video>"}], "video": "a.mp4"}, "2 video placeholders but 1"),
        ({"messages": [{"role": "user", "content": "<video>"}], "video": []}, "1 video placeholders but 0"),
        (
            {"messages": [{"role": "user", "content": "<video>"}], "videos": [{"path": "a", "nframes": 8}]},
            "video part has 'nframes'",
        ),
        (row(user({"type": "video", "video": {"path": "a", "video_start": 3}})), "video part has 'video_start'"),
        (row(user({"type": "video", "video": []})), "1 video placeholders but 0 videos"),
        (row(user({"type": "video", "video": {"path": "a.mp4", "url": "b.mp4"}})), "video part has `url` and `path`"),
        (row(user({"type": "video", "video": {"fps": 2}})), "not a video"),
    ],
)
def test_refusals_name_the_row(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parse(content)
    assert "[rows.jsonl:7]" in str(raised.value)


def test_marker_without_a_video() -> None:
    with pytest.raises(DataError, match="1 video placeholders but 0 videos"):
        parse({"conversations": [{"from": "human", "value": "<image> <video>"}], "image": "0.png"})
