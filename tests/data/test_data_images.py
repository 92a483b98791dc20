"""Decoded images equal transformers' own loader; hostile and damaged files are refused."""

from __future__ import annotations

import http.server
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image_as_tensor

from megatron_vlm.data import images
from megatron_vlm.data.conversation import ImageSource
from megatron_vlm.data.images import load_image
from megatron_vlm.errors import DataError
from tests.versions import needs_transformers_5_21


def picture() -> Image.Image:
    """A smooth coloured picture, on which JPEG decoders could differ."""
    waves = np.cumsum(np.random.default_rng(0).normal(size=(31, 45, 3)), axis=1)
    return Image.fromarray(((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGB", "JPEG", {"quality": 60}),
        ("CMYK", "JPEG", {}),
        pytest.param("RGB", "JPEG", {"exif": rotated()}, marks=needs_transformers_5_21),
        ("RGB", "WEBP", {}),
    ],
)
def test_pixels_equal_those_of_transformers(tmp_path: Path, mode: str, kind: str, options: dict[str, Any]) -> None:
    """The processor opens paths with torchvision, we with PIL: bit for bit the same."""
    path = tmp_path / "image"
    path.write_bytes(encoded(picture().convert(mode), kind, **options))
    theirs = load_image_as_tensor(str(path)).permute(1, 2, 0).numpy()
    for source in (ImageSource(path=path), ImageSource(data=path.read_bytes())):
        assert np.array_equal(np.asarray(load_image(source, "row", False)), theirs)


def refusal(source: ImageSource, allow_urls: bool = False) -> str:
    with pytest.raises(DataError) as raised:
        load_image(source, "rows.jsonl:7", allow_urls)
    assert raised.value.where == "rows.jsonl:7"
    return str(raised.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert "nothing.png does not exist" in refusal(ImageSource(path=tmp_path / "nothing.png"))
    assert "does not exist" in refusal(ImageSource(path=tmp_path))
    # Base64 text of a format that is not recognised is taken for a path, longer than any file's name may be.
    long = refusal(ImageSource(path=tmp_path / ("A" * 5000)))
    assert "does not exist" in long and len(long) < 250
    for kind in ("PNG", "JPEG"):
        data = encoded(picture(), kind)
        assert "cannot be decoded" in refusal(ImageSource(data=data[: len(data) // 2]))
    assert "cannot be decoded" in refusal(ImageSource(data=b"no image at all"))
    assert "more than 8 bits" in refusal(ImageSource(data=encoded(picture().convert("I;16"), "PNG")))


def test_formats_that_run_programs_are_refused() -> None:
    assert "cannot be decoded" in refusal(ImageSource(data=encoded(picture(), "EPS")))


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL only warns up to twice its limit; here the limit is a limit, and nothing is decoded beyond it."""
    small, bomb, huge = (encoded(Image.new("1", size), "PNG") for size in ((11, 10), (10_000, 9_000), (20_000, 9_000)))
    assert len(bomb) < 50_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the bomb was decoded"))
    assert "10000 x 9000 pixels, more than 89478485" in refusal(ImageSource(data=bomb))
    assert "is refused" in refusal(ImageSource(data=huge))
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100)
    assert "more than 100" in refusal(ImageSource(data=small))


def test_files_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(), "PNG"))
    assert "larger than 10 bytes" in refusal(ImageSource(path=path))


class OnePicture(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        if self.path == "/a.png":
            self.wfile.write(encoded(picture(), "PNG"))

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet."""


def test_urls_only_where_allowed() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), OnePicture)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert "data.allow_urls" in refusal(ImageSource(url=f"{address}/a.png"))
        loaded = load_image(ImageSource(url=f"{address}/a.png"), "row", allow_urls=True)
        assert np.array_equal(np.asarray(loaded), np.asarray(picture()))
        assert "cannot be fetched" in refusal(ImageSource(url=f"{address}/b.png"), allow_urls=True)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
