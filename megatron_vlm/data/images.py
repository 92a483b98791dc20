"""Load images from files, bytes and URLs as RGB, with limits on what untrusted data may cost.

Source: `load_image` in transformers/image_utils.py (orientation tag applied, then RGB); torchvision's decoder, which
transformers uses when it opens a path itself, gives the same pixels (a test compares them).
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps

from megatron_vlm.data.conversation import EncodedSource, ImageSource
from megatron_vlm.data.urls import UrlAccess, fetch
from megatron_vlm.errors import DataError

MAX_IMAGE_PIXELS = 89_478_485
"""Largest width x height that is decoded; PIL's own limit, which PIL only warns about up to twice its value."""
MAX_RATIO_OF_SIDES = 200
"""That of Qwen's processors; of what is thinner no processor makes anything that could be seen."""
MAX_ENCODED_BYTES = 256 * 2**20
"""Largest encoded image, or clip of audio, that is read."""
SIDEWAYS = (5, 6, 7, 8)
"""Values of the orientation tag with which height and width change places."""
PNG_ORIENTATION_KEYWORDS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
PNG_KEYWORD_BYTES = 21
# No format that runs an interpreter (EPS, PDF) or stands for another file.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(source: ImageSource, row_name: str, access: UrlAccess) -> Image.Image:
    """Read and decode one image.

    Args:
        source: where the image is.
        row_name: file and line of the row, for error messages.
        access: which URLs are fetched.

    Returns:
        The image upright, mode RGB.

    Raises:
        DataError: the image is missing, not an image, damaged, too large, or a URL where URLs are refused.
    """
    data = read_bytes(source, row_name, access)
    with refuse_damage(str(source), row_name):
        return ImageOps.exif_transpose(_open(io.BytesIO(data), source, row_name)).convert("RGB")


def image_sides(source: ImageSource, row_name: str, access: UrlAccess) -> tuple[int, int]:
    """Return the height and width of what `load_image` gives, by what the file says of itself; no pixel is decoded.

    Only a PNG file that may say its orientation behind its pixels is decoded. Arguments and errors are those of
    `load_image`, but for damage that only decoding shows.
    """
    with refuse_damage(str(source), row_name), _stream(source, row_name, access) as file:
        image = _open(file, source, row_name)
        if image.format == "PNG" and _orients_behind_pixels(file):
            image.load()
        # Not `image.getexif()`, which decodes a PNG file.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        if orientation in SIDEWAYS and image.format != "TIFF":  # of which Pillow says the upright size
            return image.width, image.height
        return image.height, image.width


def _orients_behind_pixels(file: BinaryIO) -> bool:
    """Return whether a PNG file has, after the first of its pixels, a chunk in which its orientation may stand."""
    place, has_pixels, found = file.tell(), False, False
    file.seek(8)
    while not found and len(head := file.read(8 + PNG_KEYWORD_BYTES)) > 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        has_pixels |= kind == b"IDAT"
        found = has_pixels and (kind == b"eXIf" or head[8:].startswith(PNG_ORIENTATION_KEYWORDS))
        file.seek(length + 12 - len(head), os.SEEK_CUR)
    file.seek(place)
    return found


@contextlib.contextmanager
def refuse_damage(shown: str, row_name: str) -> Iterator[None]:
    """Turn whatever a medium makes its decoder raise into an error that names it.

    Args:
        shown: what the medium is, for error messages.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: inside, whatever was raised.
    """
    try:
        yield
    except DataError:
        raise
    # Decoders raise whatever a damaged file makes them stumble over; every such failure means the same for the row.
    except Exception as error:
        reason = getattr(error, "error_string", error)  # without the address of a buffer
        raise DataError(
            f"{shown} cannot be decoded ({type(error).__name__}: {reason})", row_name, "repair or remove it"
        ) from None


def _open(file: BinaryIO, source: ImageSource, row_name: str) -> Image.Image:
    """Read an image's header, and check it; pixels are decoded when they are asked for."""
    with warnings.catch_warnings():
        # The size check below decides; PIL's warning about the same thing would only repeat it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(f"{source} is refused: {error}", row_name, "scale it down") from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"{source} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}",
            row_name,
            "scale it down",
        )
    if max(image.size) > MAX_RATIO_OF_SIDES * min(image.size):
        raise DataError(
            f"{source} has {image.width} x {image.height} pixels, one side more than {MAX_RATIO_OF_SIDES} times "
            "the other",
            row_name,
            "cut it into pieces",
        )
    if image.mode.startswith(("I", "F")):
        # Converting these to 8 bits saturates; transformers silently trains on the result.
        raise DataError(f"{source} has more than 8 bits per channel", row_name, "convert it to 8 bits")
    return image


def read_bytes(source: EncodedSource, row_name: str, access: UrlAccess) -> bytes:
    """Return the encoded bytes of an image or a clip of audio.

    Args:
        source: where the bytes are.
        row_name: file and line of the row, for error messages.
        access: which URLs are fetched.

    Raises:
        DataError: they are missing, cannot be read, are more than `MAX_ENCODED_BYTES`, or behind a URL where URLs are
            refused.
    """
    with _stream(source, row_name, access) as file:
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"{source} cannot be read ({error.strerror})", row_name) from None


def check_file(path: Path, shown: str, row_name: str) -> None:
    """Check that a file exists.

    Args:
        path: of the file.
        shown: what the file is, for error messages.
        row_name: file and line of the row, for error messages.

    Raises:
        DataError: it does not, or is a directory.
    """
    # Path.is_file and Path.is_dir raise where a name is too long.
    if os.path.isdir(path):
        raise DataError(f"{shown} is a directory", row_name, "name a file in it")
    if not os.path.isfile(path):
        raise DataError(f"{shown} does not exist", row_name, "restore the file or remove the row")


def _stream(source: EncodedSource, row_name: str, access: UrlAccess) -> BinaryIO:
    """Return the encoded bytes of a medium as an open file; errors are those of `read_bytes`."""
    if source.path is None:
        data = source.data if source.data is not None else _fetch(source, row_name, access)
        _check_encoded_bytes(len(data), source, row_name)
        return io.BytesIO(data)
    check_file(source.path, str(source), row_name)
    try:
        file = source.path.open("rb")
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror})", row_name) from None
    try:
        _check_encoded_bytes(os.fstat(file.fileno()).st_size, source, row_name)
    except DataError:
        file.close()
        raise
    return file


def _fetch(source: EncodedSource, row_name: str, access: UrlAccess) -> bytes:
    if access == UrlAccess.NONE:
        raise DataError(f"{source} is a URL", row_name, "download it, or set data.allow_urls to true to fetch URLs")
    assert source.url is not None
    return fetch(source.url, source.kind, row_name, access, MAX_ENCODED_BYTES)


def _check_encoded_bytes(num_bytes: int, source: EncodedSource, row_name: str) -> None:
    if num_bytes > MAX_ENCODED_BYTES:
        raise DataError(f"{source} is larger than {MAX_ENCODED_BYTES} bytes", row_name)
