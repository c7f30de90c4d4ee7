"""Bytes or a path to a Waveform: 16 kHz, mono, float32. libsndfile decodes, soxr resamples; no ffmpeg is needed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import LabError

SAMPLE_RATE_HZ = 16_000
"""What Whisper hears."""


class AudioError(LabError):
    """A clip that cannot be used: `reason` is one word for tables, the message says the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Waveform:
    """Decoded speech."""

    samples: np.ndarray
    """float32 [n], mono at SAMPLE_RATE_HZ, nominally within -1 to 1, all finite."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


def fingerprint(source: bytes | Path | str) -> bytes:
    """16 bytes that name an audio file by its content, whatever it is called; none where it cannot be read."""
    try:
        if isinstance(source, bytes):
            return hashlib.sha256(source).digest()[:16]
        if not Path(source).is_file():  # opening a pipe would wait for ever
            return b""
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:16]
    except (OSError, ValueError):
        return b""


def decode(source: bytes | Path | str, max_duration_s: float = float("inf")) -> Waveform:
    """Decode wav, flac, mp3 or ogg: channels are averaged, the rate becomes 16 kHz.

    Raises AudioError with reason `missing`, `empty`, `unreadable`, `too_long` (judged by the header, before anything
    is decoded, and again by what came out of it) or `not_finite`.
    """
    import soundfile

    try:
        with _at_hand(source) as place, soundfile.SoundFile(place, closefd=False) as file:
            _refuse_long(file.frames / file.samplerate, max_duration_s)
            # one second more than allowed: a header can understate what follows
            most = -1 if max_duration_s == float("inf") else int((max_duration_s + 1) * file.samplerate)
            samples, rate_hz = file.read(most, dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(
            "unreadable", f"not audio that libsndfile can read ({error.error_string.strip(' .')})"
        ) from None
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise AudioError("unreadable", f"{type(error).__name__} while decoding: {error}") from None
    return from_array(samples, rate_hz, max_duration_s)


def from_array(samples: np.ndarray, rate_hz: int, max_duration_s: float = float("inf")) -> Waveform:
    """A Waveform from samples [n] or [n, channels] (float, or integers at full scale) at `rate_hz`.

    Raises AudioError with reason `empty`, `not_finite` or `too_long`.
    """
    mono = _mono(_as_float(np.asarray(samples)))
    if mono.size == 0:
        raise AudioError("empty", "the clip holds no samples")
    if not np.isfinite(mono).all():
        raise AudioError("not_finite", "the clip holds NaN or infinite samples")
    _refuse_long(len(mono) / rate_hz, max_duration_s)
    samples = np.ascontiguousarray(_resample(mono, rate_hz), dtype=np.float32)
    if samples.size == 0:
        raise AudioError("empty", f"{len(mono)} sample(s) at {rate_hz} Hz are less than one at {SAMPLE_RATE_HZ} Hz")
    return Waveform(samples)


@contextlib.contextmanager
def _at_hand(source: bytes | Path | str) -> Iterator[io.BytesIO | str | int]:
    """What libsndfile can read by itself: through Python's file objects decoding takes a tenth longer."""
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.is_file():
            raise AudioError("missing", f"there is no file {path.name}")
        source, n_bytes = str(path), path.stat().st_size
    else:
        n_bytes = len(source)
    if n_bytes == 0:
        raise AudioError("empty", "the file has 0 bytes")
    if isinstance(source, str):
        yield source
    elif hasattr(os, "memfd_create"):
        with open(os.memfd_create("clip"), "w+b") as file:
            file.write(source)
            file.seek(0)
            yield file.fileno()
    else:
        yield io.BytesIO(source)


def _refuse_long(duration_s: float, max_duration_s: float) -> None:
    if duration_s > max_duration_s:
        raise AudioError("too_long", f"{duration_s:.1f} s, at most {max_duration_s:g} s can be used")


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Integers become shares of full scale; floats stay."""
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max + 1)
    return samples.astype(np.float32, copy=False)


def _mono(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 1:
        return samples
    # a mean over one channel takes a tenth of the time of decoding
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def _resample(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    import soxr

    return soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
