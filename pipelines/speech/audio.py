"""Bytes or a path to a Waveform: 16 kHz, mono, float32. libsndfile decodes, soxr resamples.

No ffmpeg is needed; where it is installed, `blocks` reads video files and other formats through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.infra.errors import LabError

SAMPLE_RATE_HZ = 16_000
"""What Whisper hears."""
BLOCK_S = 30.0
"""How much of a long recording is decoded at a time."""
MAX_RATE_HZ, MAX_CHANNELS = 384_000, 16
"""What recorders offer. A header that tells more makes hours of samples pass for a second."""
PATIENCE_S = 60.0
"""ffmpeg has so long for each block."""
DAMAGED = "damaged"
"""Reason of an AudioError: the recording cannot be read to its end, and what comes before the damage was read."""
_BLOCK_VALUES = 1 << 24
"""Samples of all channels that are decoded at a time at most: 64 MB."""
_FORMATS = "mov,matroska,webm,avi,flv,mpegts,mpeg,asf,aac,mp3,ogg,flac,wav,aiff,caf,amr,3gp,mp4,m4a"
"""Containers that ffmpeg may open: none that lists other files or addresses."""


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
            _refuse_unheard_of(file.samplerate, file.channels)
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


def blocks(
    source: bytes | Path | str, max_duration_s: float = float("inf"), block_s: float = BLOCK_S
) -> Iterator[np.ndarray]:
    """Decode a recording of any length in constant memory: float32 [n] at 16 kHz, block after block.

    What libsndfile cannot read goes through ffmpeg where that is installed: the first audio track of a video, too.
    Raises AudioError as `decode` does, when the block with the fault is asked for; with reason `damaged` where blocks
    came before it, and nothing after it can be read.
    """
    import soundfile

    seen = 0
    try:
        for block in _by_libsndfile(source, max_duration_s, block_s):
            seen += len(block)
            yield block
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        if seen:  # another decoder would begin anew, and all would be heard twice
            raise _damaged(seen) from None
        if not isinstance(error, soundfile.LibsndfileError):
            raise AudioError("unreadable", f"{type(error).__name__} while decoding: {error}") from None
        if shutil.which("ffmpeg") is None:
            raise AudioError(
                "unreadable",
                f"not audio that libsndfile can read ({error.error_string.strip(' .')}); ffmpeg, which reads others "
                "and video files, is not installed",
            ) from None
        yield from _by_ffmpeg(source, max_duration_s, block_s)
        return
    if not seen:
        raise AudioError("empty", "the clip holds no samples")


def _damaged(samples: int) -> AudioError:
    return AudioError(DAMAGED, f"it cannot be read after {samples / SAMPLE_RATE_HZ:.1f} s")


def _by_libsndfile(source: bytes | Path | str, max_duration_s: float, block_s: float) -> Iterator[np.ndarray]:
    import soundfile
    import soxr

    with _at_hand(source) as place, soundfile.SoundFile(place, closefd=False) as file:
        _refuse_unheard_of(file.samplerate, file.channels)
        _refuse_long(file.frames / file.samplerate, max_duration_s)
        at_once = min(int(block_s * file.samplerate), _BLOCK_VALUES // file.channels)
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32")
        same, seen = file.samplerate == SAMPLE_RATE_HZ, 0
        while True:
            read = file.read(at_once, dtype="float32", always_2d=True)
            seen += len(read)
            _refuse_long(seen / file.samplerate, max_duration_s)
            block = _finite(_mono(read))
            yield np.ascontiguousarray(block) if same else resampler.resample_chunk(block, last=not len(read))
            if not len(read):
                return


def _by_ffmpeg(source: bytes | Path | str, max_duration_s: float, block_s: float) -> Iterator[np.ndarray]:
    """The first audio track of whatever ffmpeg can read. It opens this one file: no address, no list of other files."""
    with contextlib.ExitStack() as stack:
        place, held = stack.enter_context(_for_ffmpeg(source))
        # xerror: a file that ends too soon is an error, after what came before it
        command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file"]
        command += ["-format_whitelist", _FORMATS]
        command += ["-i", f"file:{place}", "-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ)]
        process = stack.enter_context(
            subprocess.Popen([*command, "pipe:1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=held)
        )
        stack.callback(process.kill)
        seen = 0
        while raw := _read_in_time(process, int(block_s * SAMPLE_RATE_HZ) * 4):
            block = np.frombuffer(raw[: len(raw) // 4 * 4], dtype=np.float32)
            seen += len(block)
            _refuse_long(seen / SAMPLE_RATE_HZ, max_duration_s)
            yield _finite(block)
        failed = process.wait()
        if not seen:
            raise AudioError("unreadable", "neither libsndfile nor ffmpeg can read audio in it")
        if failed:
            raise _damaged(seen)


def _read_in_time(process: subprocess.Popen, n_bytes: int) -> bytes:
    """As many bytes, or what came before ffmpeg ended or its time for them was up, which ends it."""
    late = threading.Timer(PATIENCE_S, process.kill)
    late.daemon = True
    late.start()
    try:
        return process.stdout.read(n_bytes)
    finally:
        late.cancel()


@contextlib.contextmanager
def _for_ffmpeg(source: bytes | Path | str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path that ffmpeg can open, and which open files it has to be handed for that.

    It needs a file, not a pipe: mp4 may keep its index at its end. Where the system can, the file has no name, so that
    nothing of it is left behind whatever ends this process.
    """
    if not isinstance(source, bytes):
        yield str(Path(source).absolute()), ()
    elif (nameless := _nameless_file()) is not None:
        with nameless as file:
            file.write(source)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}", (file.fileno(),)
    else:
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "recording").write_bytes(source)  # closed: Windows opens no file twice
            yield str(path), ()


def _nameless_file() -> IO[bytes] | None:
    """A file in memory; None where the system has none, or does not let us."""
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return open(os.memfd_create("recording"), "w+b")
    except OSError:
        return None


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


def _finite(block: np.ndarray) -> np.ndarray:
    if not np.isfinite(block).all():
        raise AudioError("not_finite", "the recording holds NaN or infinite samples")
    return block


def _refuse_unheard_of(rate_hz: int, channels: int) -> None:
    if rate_hz > MAX_RATE_HZ or channels > MAX_CHANNELS:
        raise AudioError(
            "unreadable",
            f"{channels} channel(s) at {rate_hz} Hz; at most {MAX_CHANNELS} at {MAX_RATE_HZ} Hz can be used",
        )


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


AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".mp4", ".webm")
"""Audio where there is no table; what libsndfile cannot read is among them, so that it is rejected aloud."""
