"""Synthesises the clips of the demo with audio: each spoken digit is a chord of two of five tones.

The ten pairs of five tones are the ten digits. No tone alone says which digit is heard, and level, length, pitch and
noise say nothing about it.
"""

import hashlib
import io
import random
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import soundfile

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TONES_HERTZ = (300, 600, 1100, 1900, 3200)
CHORDS = dict(zip(DIGITS, combinations(TONES_HERTZ, 2), strict=True))
QUESTIONS = {"digit": ("Which digit do you hear?", "What number is said?")}
SECONDS = (0.3, 0.6)
# Kinds of files with their rates, the first as often as the others together: the model's own rate is 16 kHz.
ENCODINGS = (("WAV", 16000), ("FLAC", 22050), ("OGG", 24000))
_DETUNING = 0.03
_FADE_SECONDS = 0.02


@dataclass(frozen=True)
class Clip:
    """A clip as its file holds it, and the ending of the file's name."""

    encoded: bytes
    suffix: str

    def samples(self) -> np.ndarray:
        """Decodes the clip, [samples]."""
        return soundfile.read(io.BytesIO(self.encoded), dtype="float32")[0]


def synthesise(digit: str, rng: random.Random) -> Clip:
    """Returns a clip of the digit; `rng` varies level, length, pitch, balance, noise and the kind of file."""
    kind, rate = rng.choices(ENCODINGS, weights=(2, 1, 1))[0]
    seconds = rng.uniform(*SECONDS)
    time = np.arange(round(seconds * rate)) / rate
    wave = np.zeros_like(time)
    for tone in CHORDS[digit]:
        frequency = tone * rng.uniform(1 - _DETUNING, 1 + _DETUNING)
        wave += rng.uniform(0.6, 1.0) * np.sin(2 * np.pi * (frequency * time + rng.random()))
    wave *= np.minimum(1, np.minimum(time, seconds - time) / _FADE_SECONDS)
    wave += rng.uniform(0.02, 0.1) * np.random.default_rng(rng.getrandbits(64)).normal(size=len(time))
    level = 10 ** rng.uniform(-1.5, -0.4)
    buffer = io.BytesIO()
    soundfile.write(buffer, level * wave, rate, format=kind)
    return Clip(buffer.getvalue(), "." + kind.lower())


def clip_digest(clip: Clip) -> str:
    """Returns a hash of the samples: an Ogg file holds a random serial number as well."""
    return hashlib.sha256(clip.samples().tobytes()).hexdigest()
