"""Decode clips of audio as one channel at the rate that a processor takes, with limits on what untrusted data may cost.

Source: `load_audio` in transformers/audio_utils.py with its backend "soundfile", which gives the same samples (a test
compares them). It takes what it can read of a damaged file; here that is an error.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.data.audio_files import mp3_frames, ogg_is_chained, ogg_is_whole, wav_is_whole
from megatron_vlm.data.conversation import AudioSource
from megatron_vlm.data.images import read_bytes, refuse_damage
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import soundfile

MAX_AUDIO_VALUES = 2**26
"""Most samples over all channels that are decoded of a file, before and after resampling; they take 256 MiB of memory.
"""
FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
# libsndfile says the largest 64-bit number where the file leaves its length open.
FRAMES_OF_UNKNOWN_LENGTH = 2**62
# What encoders add before and after a clip and decoders take away again, at most.
MOST_MP3_SAMPLES_TRIMMED = 4 * 1152


def load_audio(
    source: AudioSource, row_name: str, access: UrlAccess, sampling_rate: int, most_samples: int
) -> np.ndarray:
    """Read and decode one clip.

    Args:
        source: where the clip is.
        row_name: file and line of the row, for error messages.
        access: which URLs are fetched.
        sampling_rate: rate of the result, in samples per second.
        most_samples: longest result.

    Returns:
        The mean of the clip's channels, [samples] float32.

    Raises:
        DataError: the clip is missing, not audio, damaged, cut off, empty, too long, or a URL where URLs are refused.
        ConfigError: a package that decodes clips cannot be imported.
    """
    require_audio_packages(row_name)
    data = read_bytes(source, row_name, access)
    with refuse_damage(str(source), row_name):
        return _decode(data, source, row_name, sampling_rate, most_samples)


def count_samples(source: AudioSource, row_name: str, access: UrlAccess, sampling_rate: int, most_samples: int) -> int:
    """Return how many samples `load_audio` gives, by what the file says of itself.

    Only MP3 is decoded for it: what its files say is an estimate. Arguments and errors are those of `load_audio`, but
    for what only decoding shows: samples that are not finite, and files that end early without their header saying so.
    """
    require_audio_packages(row_name)
    data = read_bytes(source, row_name, access)
    with refuse_damage(str(source), row_name), _open(data, source, row_name) as file:
        most_frames = most_samples * file.samplerate // sampling_rate
        _check_length(file, most_frames, source, row_name)
        num_read = len(file.read(dtype="int16")) if file.format == "MP3" else file.frames
        _check_whole(file, data, num_read, most_frames, source, row_name)
        return _resampled_length(num_read, file.samplerate, sampling_rate)


def require_audio_packages(row_name: str) -> None:
    """Refuse to go on without the packages that decode clips: every clip would be a bad row.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    # The imports are lazy: models without audio need neither, nor the package and the library that soundfile needs.
    try:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"clips of audio need the packages soundfile and soxr, which cannot be imported ({error})",
            row_name,
            "install them: pip install -c constraints.txt soundfile soxr; or remove the clips",
        ) from None


def _decode(data: bytes, source: AudioSource, row_name: str, sampling_rate: int, most_samples: int) -> np.ndarray:
    import soxr

    with _open(data, source, row_name) as file:
        rate = file.samplerate
        most_frames = most_samples * rate // sampling_rate
        _check_length(file, most_frames, source, row_name)
        channels = file.read(dtype="float32", always_2d=True).T
        _check_whole(file, data, channels.shape[1], most_frames, source, row_name)
    samples = channels.mean(axis=0) if len(channels) > 1 else channels[0]
    if not np.isfinite(samples).all():
        raise DataError(f"{source} has samples that are not finite", row_name, "repair or remove it")
    if rate != sampling_rate:
        length = _resampled_length(len(samples), rate, sampling_rate)
        samples = soxr.resample(samples, rate, sampling_rate, quality="soxr_hq")[:length]
        samples = np.pad(samples, (0, length - len(samples)))
    return np.ascontiguousarray(samples, np.float32)


def _open(data: bytes, source: AudioSource, row_name: str) -> soundfile.SoundFile:
    """Read the header of a file; samples are decoded when they are asked for."""
    import soundfile

    file = soundfile.SoundFile(io.BytesIO(data))
    if file.format not in FORMATS or file.subtype in ("MPEG_LAYER_I", "MPEG_LAYER_II"):
        file.close()
        raise DataError(
            f"{source} is a file of the kind {file.format} {file.subtype}",
            row_name,
            "convert it to WAV, FLAC, MP3 or Ogg",
        )
    return file


def _resampled_length(num_samples: int, rate: int, sampling_rate: int) -> int:
    return math.ceil(num_samples * sampling_rate / rate)


def _check_length(file: soundfile.SoundFile, most_frames: int, source: AudioSource, row_name: str) -> None:
    """Refuse a clip by what its file says of itself, before it is decoded."""
    rate = file.samplerate
    if file.frames == 0:
        raise DataError(f"{source} has no samples", row_name, "repair or remove it")
    if file.frames >= FRAMES_OF_UNKNOWN_LENGTH:
        raise DataError(f"{source} does not say how long it is", row_name, "encode it again")
    if file.frames > most_frames:
        raise DataError(
            f"{source} takes {file.frames / rate:.6g} seconds, more than the {most_frames / rate:.6g} that a clip "
            "may have",
            row_name,
            "cut it into shorter clips",
        )
    if file.frames * file.channels > MAX_AUDIO_VALUES:
        raise DataError(
            f"{source} has {file.frames} samples in {file.channels} channels, more than {MAX_AUDIO_VALUES} in all",
            row_name,
            "store it at a lower rate, in one channel",
        )


def _check_whole(
    file: soundfile.SoundFile, data: bytes, num_read: int, most_frames: int, source: AudioSource, row_name: str
) -> None:
    """Refuse what libsndfile takes silently: a file that ends early, or of which it reads only the beginning."""
    is_whole = num_read == file.frames
    if file.format == "OGG":
        is_whole &= ogg_is_whole(data)
        if ogg_is_chained(data):
            raise DataError(
                f"{source} is several Ogg streams after each other, of which only the first would be heard",
                row_name,
                "encode it again as one stream",
            )
    elif file.format in ("WAV", "WAVEX"):
        is_whole &= wav_is_whole(data)
    elif file.format == "MP3":
        found = mp3_frames(data, most_frames + MOST_MP3_SAMPLES_TRIMMED)
        if found.samples == 0 and not found.ends_early:
            raise DataError(
                f"{source} has no MP3 frame where its first one belongs, so that nothing tells whether it is whole",
                row_name,
                "encode it again",
            )
        if found.samples > num_read + MOST_MP3_SAMPLES_TRIMMED:
            raise DataError(
                f"{source} does not say how long it is, so that only {num_read / file.samplerate:.6g} seconds of it "
                "would be heard",
                row_name,
                "encode it again",
            )
        # Where the file does not say its length, that is an estimate.
        is_whole = not found.ends_early and (is_whole or not found.says_length)
    if not is_whole:
        raise DataError(f"{source} ends before its last sample", row_name, "repair or remove it")
