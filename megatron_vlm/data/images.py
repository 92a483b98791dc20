"""Load images from files, bytes and URLs as RGB, with limits on what untrusted data may cost.

Source: `load_image` in transformers/image_utils.py (orientation tag applied, then RGB); torchvision's decoder, which
transformers uses when it opens a path itself, gives the same pixels (a test compares them).
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from megatron_vlm.data.conversation import EncodedSource, ImageSource
from megatron_vlm.data.urls import UrlAccess, fetch
from megatron_vlm.errors import DataError

MAX_IMAGE_PIXELS = 89_478_485
"""Largest width x height that is decoded; PIL's own limit, which PIL only warns about up to twice its value."""
MAX_RATIO_OF_SIDES = 200
"""That of Qwen's processors; of what is thinner no processor makes anything that could be seen."""
MAX_ENCODED_BYTES = 256 * 2**20
"""Largest encoded image, or clip of audio, that is read."""
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
    try:
        return _decode(data, source, row_name)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{source} is refused: {error}", row_name, "scale it down") from None
    # Decoders raise whatever a damaged file makes them stumble over; every such failure means the same for the row.
    except Exception as error:
        raise DataError(
            f"{source} cannot be decoded ({type(error).__name__}: {error})", row_name, "repair or remove it"
        ) from None


def _decode(data: bytes, source: ImageSource, row_name: str) -> Image.Image:
    with warnings.catch_warnings():
        # The size check below decides; PIL's warning about the same thing would only repeat it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
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
    return ImageOps.exif_transpose(image).convert("RGB")


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
    data = _read(source, row_name, access)
    if len(data) > MAX_ENCODED_BYTES:
        raise DataError(f"{source} is larger than {MAX_ENCODED_BYTES} bytes", row_name)
    return data


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


def _read(source: EncodedSource, row_name: str, access: UrlAccess) -> bytes:
    if source.data is not None:
        return source.data
    if source.url is not None:
        if access == UrlAccess.NONE:
            raise DataError(f"{source} is a URL", row_name, "download it, or set data.allow_urls to true to fetch URLs")
        return fetch(source.url, source.kind, row_name, access, MAX_ENCODED_BYTES)
    assert source.path is not None
    check_file(source.path, str(source), row_name)
    try:
        with source.path.open("rb") as file:
            return file.read(MAX_ENCODED_BYTES + 1)
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror})", row_name) from None
