"""Eight clips for exercise 1, three of which have a fault that a listener finds in seconds."""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass

import numpy as np

from pipelines.features.sources.synthetic import espeak, planted

KINDS = ("wrong transcript", "clipped", "cut off")
_LINES = (
    ("Bussen till sjukhuset går var tionde minut.", "sv+f4"),
    ("Vi ställde cyklarna bakom ladugården.", "sv+m1"),
    ("Hon köpte nybakat bröd på torget.", "sv+f5"),
    ("Mötet börjar klockan halv nio.", "sv+m4"),
    ("Katten sover hela dagen i fönstret.", "sv+m5"),
    ("Brevet ska skickas före fredag.", "sv+f4"),
    ("Barnen åkte skridskor på sjön.", "sv+m7"),
    ("Glöm inte att vattna blommorna.", "sv+f5"),
)
_RATE_WPM, _PITCH = 150, 50


@dataclass(frozen=True)
class Clip:
    """A clip of the exercise: what the corpus claims was said, and the sound."""

    name: str
    transcript: str
    wav: bytes


def faults() -> dict[str, str]:
    """Return the faulty clips: name to kind."""
    numbers = random.Random("clips to listen to").sample(range(len(_LINES)), len(KINDS))
    return {_name(number): kind for number, kind in zip(numbers, KINDS, strict=True)}


@functools.cache
def clips() -> list[Clip]:
    """Return the clips, spoken by eSpeak NG on this machine."""
    kinds = faults()
    return [_clip(number, kinds.get(_name(number), "")) for number in range(len(_LINES))]


def _name(number: int) -> str:
    return f"clip {number + 1}"


def _clip(number: int, kind: str) -> Clip:
    import soundfile

    text, variant = _LINES[number]
    samples, rate_hz = soundfile.read(io.BytesIO(espeak.synthesise(text, variant, _RATE_WPM, _PITCH)))
    if kind == "wrong transcript":
        text = _LINES[(number + 1) % len(_LINES)][0]
    elif kind == "clipped":
        samples = np.clip(3.0 * planted.clip(samples), -1.0, 1.0)
    elif kind == "cut off":
        samples = samples[: len(samples) // 2]
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="PCM_16")
    return Clip(_name(number), text, file.getvalue())
