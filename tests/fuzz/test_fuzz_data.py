"""Rows, images and sounds that nobody meant: each is read, or is a bad row with one line."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.audio import count_samples, load_audio
from megatron_vlm.data.conversation import AudioSource, ImageSource
from megatron_vlm.data.describe import check_rows
from megatron_vlm.data.images import image_sides, load_image
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import DataError
from tests.data.conftest import read_rows
from tests.data.rows import assistant, audio, image, row, user, video
from tests.data.sounds import encoded, tone, write_tones
from tests.fuzz.mutations import check_line, damaged, mutated, within_limits

ROWS, IMAGES, SOUNDS = 400, 400, 400
SEEDS: list[dict[str, Any]] = [
    row(user("Hello, how are you?"), assistant("I am fine.")),
    row(user(image("0.png"), "What colour?"), assistant("Red."), user(image("1.png"), "And?"), assistant("Blue.")),
    row({"role": "system", "content": "Be kind."}, user({**image("2.png"), "max_pixels": 64}), assistant("Yes.")),
    row(user(video(["0.png", "0.png"], 2)), assistant("A ball.")),
    row(user(audio("a.wav"), "And?", {"type": "audio_url", "audio_url": {"url": "a.wav"}}), assistant("A tone.")),
    {"messages": [{"role": "user", "content": "<audio>?"}, {"role": "assistant", "content": "x"}], "audios": ["a.wav"]},
    row(user("a"), {"role": "assistant", "content": "4", "reasoning_content": "two", "loss": True, "weight": 1}),
    {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}], "images": ["3.png"]},
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}], "image": "4.png"},
    {**row(user({"type": "image", "index": 1}, {"type": "image"}), assistant("b")), "image": ["0.png"] * 2},
    {"system": "s", "messages": [user("a"), assistant("b"), user("c"), assistant("d")], "id": 7, "videos": []},
]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["builder", "qwen_builder", "mistral_builder", "gemma4_builder", "gemma4_unified_builder"]
)
def test_rows(family: str, folder: Path, factor: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(f"rows of {family}")
    write_tones(folder, {"a": 0.2})
    lines: list[str | bytes] = []
    while len(lines) < ROWS * factor:
        line: str | bytes = json.dumps(mutated(rng.choice(SEEDS), rng))
        if rng.random() < 0.15:
            line = damaged(str(line).encode(), rng, head=10_000).replace(b"\n", b"")
        lines.append(line)
    with within_limits(f"{family}, opening"):
        builder = request.getfixturevalue(family)
        length = 2 * builder.shortest_image_row_tokens
        reader = read_rows(builder, folder, lines, max_bad_fraction=1.0, seq_length=max(128, length))
    outcomes = Counter[bool]()
    for number in range(reader.sources[0].num_rows):
        file, _ = reader.sources[0].locate(number)
        case = f"{family}, row {number}: {file.read(number)[:500]!r}"
        with within_limits(case):
            loaded = reader.read(0, number)
        if loaded.problem:
            check_line(case, loaded.problem)
        outcomes[loaded.bad] += 1
    assert min(outcomes[True], outcomes[False]) > len(lines) // 100, outcomes
    check = check_rows(reader)
    for line in check.problems + check.notes:
        check_line(family, line)


def pictures() -> list[bytes]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8))
    encoded = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB")):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind)
        encoded.append(buffer.getvalue())
    for kind in ("TIFF", "BMP", "PPM"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        encoded.append(buffer.getvalue())
    return encoded


def test_images(factor: int) -> None:
    rng, originals = random.Random("images"), pictures()
    outcomes = Counter[str]()
    for number in range(IMAGES * factor):
        data = damaged(rng.choice(originals), rng, head=60)
        case = f"image {number}: {data[:200]!r}"
        with within_limits(case):
            try:
                image = load_image(ImageSource(data=data), "row", UrlAccess.NONE)
                assert image.mode == "RGB", case
                assert image_sides(ImageSource(data=data), "row", UrlAccess.NONE) == (image.height, image.width), case
                outcomes["read"] += 1
            except DataError as error:
                check_line(case, str(error))
                outcomes["refused"] += 1
    assert min(outcomes.values()) > IMAGES // 20, outcomes


def test_sounds(factor: int) -> None:
    rng, samples = random.Random("sounds"), tone(0.2, 24000, 2)
    originals = [encoded(samples, kind, 24000) for kind in ("WAV", "FLAC", "MP3", "OGG")]
    originals.append(encoded(samples, "OGG", 24000, subtype="OPUS"))
    outcomes = Counter[str]()
    for number in range(SOUNDS * factor):
        data = damaged(rng.choice(originals), rng, head=60)
        case = f"sound {number}: {data[:200]!r}"
        with within_limits(case):
            try:
                samples = load_audio(AudioSource(data=data), "row", UrlAccess.NONE, 16000, 480_000)
                assert samples.ndim == 1 and 0 < len(samples) <= 480_000 and np.isfinite(samples).all(), case
                counted = count_samples(AudioSource(data=data), "row", UrlAccess.NONE, 16000, 480_000)
                assert counted == len(samples), case
                outcomes["read"] += 1
            except DataError as error:
                check_line(case, str(error))
                outcomes["refused"] += 1
    assert min(outcomes.values()) > SOUNDS // 20, outcomes
