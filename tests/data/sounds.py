"""Sounds that tests synthesise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def tone(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """A tone of 440 Hz with some noise, [samples, channels]; each channel is louder than the one before."""
    samples = round(seconds * rate)
    wave = 0.2 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)[:, None] * np.arange(1, channels + 1)
    return wave + 0.02 * np.random.default_rng(0).normal(size=wave.shape)


def encoded(samples: np.ndarray, kind: str = "WAV", rate: int = 16000, **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def write_tones(folder: Path, lengths: dict[str, float]) -> Path:
    """Write NAME.wav for names with seconds."""
    for name, seconds in lengths.items():
        (folder / f"{name}.wav").write_bytes(encoded(tone(seconds)))
    return folder
