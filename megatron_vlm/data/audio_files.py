"""Tell whether files of audio are whole, which libsndfile does not: it reads what there is.

Sources: RIFF WAVE (Microsoft, 1991), Ogg (RFC 3533), MPEG-1 and MPEG-2 audio layer III (ISO 11172-3, 13818-3), ID3
(version 2.4.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Programs that write to a pipe do not know how much will follow, and say one of these.
FEWEST_BYTES_OF_UNKNOWN_LENGTH = 0x7FFFF000
# In kbit/s, of MPEG-1 and of the later two; 0 is "free", of which no length follows.
MP3_BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
MP3_RATES = (44100, 48000, 32000)
MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")


def wav_is_whole(data: bytes) -> bool:
    """Return whether a WAV file has as many bytes of samples as it says."""
    order: Literal["big", "little"] = "big" if data.startswith(b"RIFX") else "little"
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], order)
        if data[place : place + 4] == b"data":
            return size >= FEWEST_BYTES_OF_UNKNOWN_LENGTH or place + 8 + size <= len(data)
        place += 8 + size + size % 2
    return False


def ogg_is_whole(data: bytes) -> bool:
    """Return whether the last page of an Ogg file is complete, and marked as the last."""
    page = data[data.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and 27 + page[26] + sum(page[27 : 27 + page[26]]) <= len(page)


def ogg_is_chained(data: bytes) -> bool:
    """Return whether a further Ogg stream begins after the first, of which libsndfile alone reads."""
    begun = False
    for kind in _ogg_pages(data):
        if begun and kind & 2:
            return True
        begun |= not kind & 2  # streams side by side all begin before any goes on
    return False


def _ogg_pages(data: bytes) -> Iterator[int]:
    """Iterate over the kinds of an Ogg file's pages: 2 set where a stream begins, 4 where it ends."""
    place = data.find(b"OggS")
    while 0 <= place <= len(data) - 27:
        yield data[place + 5]
        segments = data[place + 27 : place + 27 + data[place + 26]]
        place = data.find(b"OggS", place + 27 + len(segments) + sum(segments))


@dataclass(frozen=True)
class Mp3Frames:
    """What the frames of an MP3 file say.

    Attributes:
        samples: how many they hold together, of one channel; no more are counted than asked.
        says_length: the first frame says how many follow.
        ends_early: the last one is cut off.
    """

    samples: int
    says_length: bool
    ends_early: bool


def mp3_frames(data: bytes, most_samples: int) -> Mp3Frames:
    """Walk through the frames of an MP3 file.

    Args:
        data: the file.
        most_samples: where to stop.
    """
    place, samples, says_length = 0, 0, False
    while samples <= most_samples:
        place = _end_of_id3(data, place)
        if (frame := _mp3_frame(data[place : place + 4])) is None:
            break
        length, samples_in_frame = frame
        if place + length > len(data):
            return Mp3Frames(samples, says_length, ends_early=True)
        if samples == 0 and not says_length and any(tag in data[place : place + length] for tag in MP3_LENGTH_TAGS):
            says_length = True
        else:
            samples += samples_in_frame
        place += length
    return Mp3Frames(samples, says_length, ends_early=False)


def _end_of_id3(data: bytes, place: int) -> int:
    """Return where ID3v2 tags that begin at a place end; their size is written in seven bits of each byte."""
    while data.startswith(b"ID3", place) and place + 10 <= len(data):
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 0x7F
        has_footer = data[place + 5] & 0x10
        place += 10 + size + (10 if has_footer else 0)
    return place


def _mp3_frame(header: bytes) -> tuple[int, int] | None:
    """Return the length in bytes and the number of samples of the frame that a header begins, None if it is none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, bitrate_index, rate_index = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bitrate_index in (0, 15) or rate_index == 3:
        return None
    is_mpeg1 = version == 3
    rate = MP3_RATES[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    samples = 1152 if is_mpeg1 else 576
    bitrate = MP3_BITRATES[0 if is_mpeg1 else 1][bitrate_index] * 1000
    return samples // 8 * bitrate // rate + (header[2] >> 1 & 1), samples
