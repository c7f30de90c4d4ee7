"""Sounds without speech, and very short words: what a speech detector must drop and keep. All are generated.

`non_speech()` returns 60 sounds: digital silence, tones, hum, clicks, noise of five colours, music and breaths, at
peaks from -60 to 0 dBFS, 0.3 to 30 s long. `short_words()` returns 40 clips of eSpeak NG: 20 Swedish words of one or
two syllables, each by a woman and a man, without silence before and after.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pipelines.features.sources.synthetic import espeak
from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ

WORDS = (
    "ja", "nej", "hej", "tack", "nu", "du", "kom", "stopp", "vänta", "bra",
    "ett", "två", "tre", "fyra", "fem", "sex", "sju", "åtta", "nio", "tio",
)  # fmt: skip
VOICES = ("sv+f2", "sv+m3")
_AUDIBLE = 0.02
"""Share of the largest sample below which the edges of a word are cut off."""


class Sound(NamedTuple):
    """A recording and what it is."""

    name: str
    """Kind, parameters, length and peak, such as `hum 50 3s -20dBFS`; for a word, word and voice."""
    samples: np.ndarray
    """float32 [n] at 16 kHz."""


def non_speech() -> list[Sound]:
    """Return the 60 sounds; the same on every call."""
    plan = [
        *[("silence", _silence, (), seconds, 0) for seconds in (0.3, 1, 3.5, 30)],
        *[("tone", _tone, (hz,), seconds, db) for hz, seconds, db in _TONES],
        *[("hum", _hum, (hz,), seconds, db) for hz, seconds, db in _HUMS],
        *[("clicks", _clicks, (rate,), seconds, db) for rate, seconds, db in _CLICKS],
        *[(f"{color}-noise", _noise, (exponent,), seconds, db) for color, exponent, seconds, db in _NOISES],
        *[(f"music-{name}", play, (), seconds, db) for name, play, seconds, db in _MUSIC],
        *[("breath", _breath, (rate,), seconds, db) for rate, seconds, db in _BREATHS],
    ]
    return [
        Sound(
            " ".join([kind, *(f"{value:g}" for value in values), f"{seconds:g}s", f"{-db:g}dBFS"]),
            at_peak(make(np.random.default_rng(number), int(seconds * SAMPLE_RATE_HZ), *values), -db),
        )
        for number, (kind, make, values, seconds, db) in enumerate(plan)
    ]


def short_words() -> list[Sound]:
    """Return the 40 words; the same on every call."""
    return [Sound(f"{word} {voice}", word_sound(word, voice)) for word in WORDS for voice in VOICES]


@functools.cache
def word_sound(word: str, voice: str = VOICES[0], rate_wpm: int = 160) -> np.ndarray:
    """Return a word without the silence around it, float32 [n] at 16 kHz."""
    samples = audio.decode(espeak.synthesise(word, voice, rate_wpm, 50)).samples
    audible = np.flatnonzero(np.abs(samples) > _AUDIBLE * np.abs(samples).max())
    return samples[audible[0] : audible[-1] + 1]


def at_peak(samples: np.ndarray, peak_dbfs: float) -> np.ndarray:
    """Return the samples as float32 with this peak in decibels relative to full scale."""
    peak = np.abs(samples).max()
    return (samples * (10 ** (peak_dbfs / 20) / peak if peak else 0.0)).astype(np.float32)


def _times(n: int) -> np.ndarray:
    return np.arange(n) / SAMPLE_RATE_HZ


def _silence(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.zeros(n)


def _tone(rng: np.random.Generator, n: int, hz: float) -> np.ndarray:
    """A tone; below 0 a sweep up to that frequency."""
    if hz > 0:
        return np.sin(2 * np.pi * hz * _times(n))
    return np.sin(2 * np.pi * np.cumsum(np.geomspace(80, -hz, n)) / SAMPLE_RATE_HZ)


def _hum(rng: np.random.Generator, n: int, hz: float) -> np.ndarray:
    """Mains hum: decaying harmonics and a little noise."""
    harmonics = sum(np.sin(2 * np.pi * hz * k * _times(n) + rng.uniform(0, 6)) / k**1.5 for k in range(1, 9))
    return harmonics + 0.01 * rng.standard_normal(n)


def _clicks(rng: np.random.Generator, n: int, per_s: float) -> np.ndarray:
    """Short decaying knocks at random moments, as of a keyboard."""
    samples = np.zeros(n)
    knock_n = SAMPLE_RATE_HZ // 50
    for at in rng.integers(0, max(n - knock_n, 1), max(1, int(per_s * n / SAMPLE_RATE_HZ))):
        knock = rng.standard_normal(knock_n) * np.exp(-np.arange(knock_n) / 40)
        samples[at : at + knock_n] += knock[: n - at] * rng.uniform(0.3, 1)
    return samples + 1e-4 * rng.standard_normal(n)


def _noise(rng: np.random.Generator, n: int, exponent: float) -> np.ndarray:
    """Noise whose power falls with frequency to the power of `exponent`."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hz = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE_HZ), 20.0)
    return np.fft.irfft(spectrum * hz ** (-exponent / 2), n)


def _chords(rng: np.random.Generator, n: int) -> np.ndarray:
    """A chord each second, of decaying harmonics."""
    samples, t = np.zeros(n), _times(n)
    for start in range(0, n, SAMPLE_RATE_HZ):
        root = 110 * 2 ** (rng.integers(0, 12) / 12)
        t_chord = t[: min(SAMPLE_RATE_HZ, n - start)]
        for ratio in (1, 5 / 4, 3 / 2):
            for k in range(1, 6):
                samples[start : start + len(t_chord)] += (
                    np.sin(2 * np.pi * root * ratio * k * t_chord) / k * np.exp(-2 * t_chord)
                )
    return samples


def _melody(rng: np.random.Generator, n: int) -> np.ndarray:
    """Plucked notes, four a second."""
    samples, step = np.zeros(n), SAMPLE_RATE_HZ // 4
    for start in range(0, n, step):
        hz = 220 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11, 12]) / 12)
        t = _times(min(step, n - start))
        samples[start : start + len(t)] = sum(np.sin(2 * np.pi * hz * k * t) / k**2 for k in range(1, 8)) * np.exp(
            -6 * t
        )
    return samples


def _drums(rng: np.random.Generator, n: int) -> np.ndarray:
    """A low beat and a hiss in turn, twice a second each."""
    samples, step = np.zeros(n), SAMPLE_RATE_HZ // 4
    for number, start in enumerate(range(0, n, step)):
        t = _times(min(step, n - start))
        low = np.sin(2 * np.pi * 60 * t) * np.exp(-18 * t)
        samples[start : start + len(t)] = (
            low if number % 2 == 0 else 0.4 * rng.standard_normal(len(t)) * np.exp(-30 * t)
        )
    return samples


def _strings(rng: np.random.Generator, n: int) -> np.ndarray:
    """A long note with vibrato and many harmonics."""
    phase = 2 * np.pi * np.cumsum(294 * (1 + 0.006 * np.sin(2 * np.pi * 5.5 * _times(n)))) / SAMPLE_RATE_HZ
    return sum(np.sin(k * phase) / k for k in range(1, 12)) * np.minimum(1, _times(n) * 4)


def _breath(rng: np.random.Generator, n: int, per_s: float) -> np.ndarray:
    """Breaths: noise from 300 to 3,000 Hz that swells and fades."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE_HZ)
    shape = np.exp(-0.5 * (np.log(np.maximum(hz, 1) / 1_000) / 0.7) ** 2)
    return np.fft.irfft(spectrum * shape, n) * np.sin(np.pi * per_s * _times(n)) ** 2


# Peaks are decibels below full scale.
_TONES = (
    (440, 0.3, 6),
    (1_000, 1, 20),
    (1_000, 3, 6),
    (3_000, 1.5, 40),
    (200, 3.5, 20),
    (-4_000, 5, 10),
    (440, 10, 40),
    (120, 2, 12),
)
_HUMS = ((50, 0.5, 20), (50, 3, 20), (50, 3, 46), (60, 1, 6), (100, 2, 30), (50, 10, 30), (120, 3.5, 12), (50, 30, 20))
_CLICKS = ((1, 0.3, 0), (1, 1, 6), (8, 3, 10), (5, 10, 30), (12, 2, 20), (4, 30, 6), (2, 3.5, 40))
_NOISES = (
    ("white", 0, 0.3, 10), ("white", 0, 1, 30), ("white", 0, 3, 50), ("white", 0, 30, 20), ("white", 0, 3.5, 60),
    ("pink", 1, 1, 10), ("pink", 1, 3, 30), ("pink", 1, 10, 50), ("pink", 1, 3.5, 20),
    ("brown", 2, 0.5, 6), ("brown", 2, 3, 20), ("brown", 2, 10, 40),
    ("blue", -1, 1, 20), ("blue", -1, 3, 40), ("violet", -2, 2, 30), ("violet", -2, 10, 10),
)  # fmt: skip
_MUSIC = (
    ("chords", _chords, 1, 10), ("chords", _chords, 3, 20), ("chords", _chords, 10, 10), ("melody", _melody, 3, 10),
    ("melody", _melody, 10, 30), ("drums", _drums, 3, 6), ("drums", _drums, 10, 20), ("strings", _strings, 2, 10),
    ("strings", _strings, 10, 20),
)  # fmt: skip
_BREATHS = (
    (2, 0.5, 20),
    (0.7, 1.4, 20),
    (0.5, 3, 30),
    (0.3, 3.5, 40),
    (0.5, 10, 20),
    (0.4, 10, 40),
    (0.5, 30, 30),
    (1, 1, 50),
)
