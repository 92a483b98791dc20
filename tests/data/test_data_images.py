"""Decoded images equal transformers' own loader; hostile and damaged files are refused."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image_as_tensor

from megatron_vlm.data import images, urls
from megatron_vlm.data.conversation import ImageSource
from megatron_vlm.data.images import load_image
from megatron_vlm.data.urls import UrlAccess
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
        ("P", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("L", "PNG", {"transparency": 5}),
        ("P", "GIF", {"transparency": 3}),
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
        assert np.array_equal(np.asarray(load_image(source, "row", UrlAccess.NONE)), theirs)


def refusal(source: ImageSource, access: UrlAccess = UrlAccess.NONE) -> str:
    with pytest.raises(DataError) as raised:
        load_image(source, "rows.jsonl:7", access)
    assert raised.value.where == "rows.jsonl:7"
    return str(raised.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert "nothing.png does not exist" in refusal(ImageSource(path=tmp_path / "nothing.png"))
    assert "is a directory" in refusal(ImageSource(path=tmp_path))
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
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 10)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(), "PNG"))
    assert "larger than 10 bytes" in refusal(ImageSource(path=path))


class Pictures(http.server.BaseHTTPRequestHandler):
    """Serves a picture, and answers that no picture can be made of."""

    def do_GET(self) -> None:
        if self.path == "/slow.png":
            time.sleep(1.0)  # past the deadline of the test
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
        elif self.path == "/headers.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n")
            return
        elif self.path == "/nonsense.png":
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        elif self.path == "/cut.png":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
        else:
            self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        if self.path in ("/a.png", "/cut.png"):
            self.wfile.write(encoded(picture(), "PNG"))

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave early
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_only_where_allowed(address: str) -> None:
    source = ImageSource(url=f"{address}/a.png")
    assert "data.allow_urls" in refusal(source)
    assert "private address 127.0.0.1" in refusal(source, UrlAccess.PUBLIC)
    assert "data.allow_private_urls" in refusal(source, UrlAccess.PUBLIC)
    assert np.array_equal(np.asarray(load_image(source, "row", UrlAccess.ALL)), np.asarray(picture()))


def test_redirects_are_followed_within_the_rules(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    redirected = ImageSource(url=f"{address}/to/{address}/a.png")
    assert np.array_equal(np.asarray(load_image(redirected, "row", UrlAccess.ALL)), np.asarray(picture()))
    # A public name may redirect to a private address: here the first is taken for public.
    port = int(address.rpartition(":")[2])
    is_private = urls._is_private
    monkeypatch.setattr(urls, "_is_private", lambda ip: ip != "127.0.0.1" and is_private(ip))
    assert "private address" in refusal(
        ImageSource(url=f"{address}/to/http://127.0.0.2:{port}/a.png"), UrlAccess.PUBLIC
    )
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA"):
        assert "cannot be fetched" in refusal(ImageSource(url=f"{address}/to/{target}"), UrlAccess.ALL)


@pytest.mark.parametrize("name", ["missing", "headers", "nonsense", "cut", "slow"])
def test_urls_that_fail(address: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "DEADLINE_SECONDS", 0.5)
    message = refusal(ImageSource(url=f"{address}/{name}.png"), UrlAccess.ALL)
    assert f"{name}.png cannot be fetched" in message and len(message) < 600
    if name == "slow":
        assert "longer than 0.5 s" in message


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/c", "http://\ud83d/", "http://" + "a" * 5000])
def test_urls_that_are_none(url: str) -> None:
    message = refusal(ImageSource(url=url), UrlAccess.PUBLIC)
    assert "cannot be fetched" in message and len(message) < 600


def test_the_deadline_holds_for_a_connection_that_tls_took_over(address: str) -> None:
    """TLS detaches the socket that was connected and makes another of its descriptor."""
    fetching = urls._Fetching(UrlAccess.ALL)
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.socket(fileno=fetching.connect((host, int(port))).detach()) as taken:
        taken.settimeout(10)
        fetching.end()
        assert taken.recv(1) == b""  # nothing was asked for, so that only the end brings an answer
    fetching.close()


@pytest.mark.parametrize("ip", "10.1.2.3 127.0.0.1 169.254.1.2 192.168.0.1 ::1 fe80::1%eth0 ::ffff:10.0.0.1".split())
def test_private_addresses(ip: str) -> None:
    assert urls._is_private(ip) and not urls._is_private("8.8.8.8")
