"""Decode audio from bytes or a path to a Waveform: 16 kHz, mono, float32. libsndfile decodes, soxr resamples.

ffmpeg is optional: if it is installed, `blocks` reads video files and further formats with it.
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

from pipelines.infra import files
from pipelines.infra.errors import LabError

SAMPLE_RATE_HZ = 16_000
"""Sampling rate of Whisper's input."""
BLOCK_S = 30.0
"""Duration of the blocks in which `blocks` decodes a recording."""
MAX_RATE_HZ, MAX_CHANNELS = 384_000, 16
"""The most that recorders offer. With a larger rate in its header, hours of samples would count as a second."""
FFMPEG_TIMEOUT_S = 60.0
"""Time that ffmpeg may take for one block."""
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".mp4", ".webm")
"""Suffixes of audio files in a folder without a table. Some need ffmpeg: they are listed so that they are rejected with
a reason instead of being skipped."""
DAMAGED = "damaged"
"""Reason of an AudioError: the recording could be read only up to some point."""
_MAX_BLOCK_VALUES = 1 << 24
"""Most values, over all channels, that are decoded at a time: 64 MB of float32."""
_FFMPEG_FORMATS = "mov,matroska,webm,avi,flv,mpegts,mpeg,asf,aac,mp3,ogg,flac,wav,aiff,caf,amr,3gp,mp4,m4a"
"""Containers that ffmpeg may open: none of them refers to other files or addresses."""


class AudioError(LabError):
    """A clip that cannot be used."""

    def __init__(self, reason: str, detail: str):
        """`reason` is one word for tables, `detail` completes the message."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Waveform:
    """A decoded clip."""

    samples: np.ndarray
    """float32 [n], mono at SAMPLE_RATE_HZ, nominally from -1 to 1, all finite."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


def fingerprint(source: bytes | Path | str) -> bytes:
    """Return the first 16 bytes of the sha256 of an audio file's content; b"" if there is no such file.

    Raises Unavailable if it cannot be read at the moment.
    """

    def digest() -> bytes:
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:16]

    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()[:16]
    try:
        return files.retry(digest, source) if files.is_file(source) else b""  # opening a pipe would block
    except OSError:
        return b""


def decode(source: bytes | Path | str, max_duration_s: float = float("inf")) -> Waveform:
    """Decode wav, flac, mp3 or ogg: channels are averaged, the rate becomes 16 kHz.

    Raises AudioError with reason `missing`, `empty`, `lfs_pointer`, `unreadable`, `too_long` (checked in the header
    before decoding, and again in the decoded samples) or `not_finite`; Unavailable if the file cannot be read at the
    moment.
    """
    import soundfile

    try:
        with _open_for_libsndfile(source) as target, soundfile.SoundFile(target, closefd=False) as file:
            _check_header(file.samplerate, file.channels)
            _check_duration(file.frames / file.samplerate, max_duration_s)
            # one second more than allowed: the header can understate the duration
            max_frames = -1 if max_duration_s == float("inf") else int((max_duration_s + 1) * file.samplerate)
            samples, rate_hz = file.read(max_frames, dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        _check_available(source)
        raise AudioError(
            "unreadable", f"not audio that libsndfile can read ({error.error_string.strip(' .')})"
        ) from None
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        _check_available(source)
        raise AudioError("unreadable", f"{type(error).__name__} while decoding: {error}") from None
    return from_array(samples, rate_hz, max_duration_s)


def blocks(
    source: bytes | Path | str, max_duration_s: float = float("inf"), block_s: float = BLOCK_S
) -> Iterator[np.ndarray]:
    """Yield the samples of a recording of any length in constant memory: float32 [n] at 16 kHz, block by block.

    Files that libsndfile cannot read are decoded by ffmpeg if that is installed, including the first audio track of a
    video. Raises AudioError as `decode` does, at the block with the fault; with reason `damaged` if blocks came before
    it and the rest cannot be read.
    """
    import soundfile

    n_samples = 0
    try:
        for block in _libsndfile_blocks(source, max_duration_s, block_s):
            n_samples += len(block)
            yield block
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        _check_available(source)
        if n_samples:  # ffmpeg would start from the beginning and repeat these blocks
            raise _damaged(n_samples) from None
        if not isinstance(error, soundfile.LibsndfileError):
            raise AudioError("unreadable", f"{type(error).__name__} while decoding: {error}") from None
        if shutil.which("ffmpeg") is None:
            raise AudioError(
                "unreadable",
                f"not audio that libsndfile can read ({error.error_string.strip(' .')}); ffmpeg, which reads others "
                "and video files, is not installed",
            ) from None
        yield from _ffmpeg_blocks(source, max_duration_s, block_s)
        return
    if not n_samples:
        raise AudioError("empty", "the clip holds no samples")


def _check_available(source: bytes | Path | str) -> None:
    """Raise Unavailable if the file cannot be read at the moment: then its content is not at fault."""
    if not isinstance(source, bytes):
        files.check_readable(source)


def _damaged(n_samples: int) -> AudioError:
    return AudioError(DAMAGED, f"it cannot be read after {n_samples / SAMPLE_RATE_HZ:.1f} s")


def _libsndfile_blocks(source: bytes | Path | str, max_duration_s: float, block_s: float) -> Iterator[np.ndarray]:
    import soundfile
    import soxr

    with _open_for_libsndfile(source) as target, soundfile.SoundFile(target, closefd=False) as file:
        _check_header(file.samplerate, file.channels)
        _check_duration(file.frames / file.samplerate, max_duration_s)
        block_frames = min(int(block_s * file.samplerate), _MAX_BLOCK_VALUES // file.channels)
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32")
        same_rate, n_frames = file.samplerate == SAMPLE_RATE_HZ, 0
        while True:
            frames = file.read(block_frames, dtype="float32", always_2d=True)
            n_frames += len(frames)
            _check_duration(n_frames / file.samplerate, max_duration_s)
            block = _finite(_mono(frames))
            yield np.ascontiguousarray(block) if same_rate else resampler.resample_chunk(block, last=not len(frames))
            if not len(frames):
                return


def _ffmpeg_blocks(source: bytes | Path | str, max_duration_s: float, block_s: float) -> Iterator[np.ndarray]:
    """Yield the first audio track of a file, decoded by ffmpeg, which may open this file only."""
    with contextlib.ExitStack() as stack:
        path, inherited = stack.enter_context(_open_for_ffmpeg(source))
        # xerror: report a truncated file as an error, after the samples before it
        command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file"]
        command += ["-format_whitelist", _FFMPEG_FORMATS]
        command += ["-i", f"file:{path}", "-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "pass_fds": inherited}
        process = stack.enter_context(subprocess.Popen([*command, "pipe:1"], **pipes))
        stack.callback(process.kill)
        n_samples = 0
        while raw := _read_with_timeout(process, int(block_s * SAMPLE_RATE_HZ) * 4):
            block = np.frombuffer(raw[: len(raw) // 4 * 4], dtype=np.float32)
            n_samples += len(block)
            _check_duration(n_samples / SAMPLE_RATE_HZ, max_duration_s)
            yield _finite(block)
        failed = process.wait()
        if not n_samples:
            raise AudioError("unreadable", "neither libsndfile nor ffmpeg can read audio in it")
        if failed:
            raise _damaged(n_samples)


def _read_with_timeout(process: subprocess.Popen, n_bytes: int) -> bytes:
    """Read `n_bytes`; fewer at the end of ffmpeg's output, or after FFMPEG_TIMEOUT_S, when the process is killed."""
    timer = threading.Timer(FFMPEG_TIMEOUT_S, process.kill)
    timer.daemon = True
    timer.start()
    try:
        return process.stdout.read(n_bytes)
    finally:
        timer.cancel()


@contextlib.contextmanager
def _open_for_ffmpeg(source: bytes | Path | str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield a path that ffmpeg can open and the file descriptors that it must inherit for that.

    Bytes become a file, not a pipe, because mp4 may store its index at the end. The file is anonymous where the system
    allows it, so nothing is left on the disk if this process is killed.
    """
    if not isinstance(source, bytes):
        yield str(Path(source).absolute()), ()
    elif (anonymous := _anonymous_file()) is not None:
        with anonymous as file:
            file.write(source)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}", (file.fileno(),)
    else:
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "recording").write_bytes(source)  # closed: Windows opens no file twice
            yield str(path), ()


def _anonymous_file() -> IO[bytes] | None:
    """Return a file in memory; None if the system does not support or allow it."""
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return open(os.memfd_create("recording"), "w+b")
    except OSError:
        return None


def from_array(samples: np.ndarray, rate_hz: int, max_duration_s: float = float("inf")) -> Waveform:
    """Return a Waveform from samples [n] or [n, channels] (float, or integers at full scale) at `rate_hz`.

    Raises AudioError with reason `empty`, `not_finite` or `too_long`.
    """
    mono = _mono(_as_float(np.asarray(samples)))
    if mono.size == 0:
        raise AudioError("empty", "the clip holds no samples")
    if not np.isfinite(mono).all():
        raise AudioError("not_finite", "the clip holds NaN or infinite samples")
    _check_duration(len(mono) / rate_hz, max_duration_s)
    samples = np.ascontiguousarray(_resample(mono, rate_hz), dtype=np.float32)
    if samples.size == 0:
        raise AudioError("empty", f"{len(mono)} sample(s) at {rate_hz} Hz are less than one at {SAMPLE_RATE_HZ} Hz")
    return Waveform(samples)


@contextlib.contextmanager
def _open_for_libsndfile(source: bytes | Path | str) -> Iterator[io.BytesIO | str | int]:
    """Yield a path or file descriptor: through Python's file objects decoding takes a tenth longer."""
    if not isinstance(source, bytes):
        path = Path(source)
        if not files.is_file(path):
            raise AudioError("missing", f"there is no file {path.name}")
        source, n_bytes = str(path), path.stat().st_size
    else:
        n_bytes = len(source)
    if files.is_lfs_pointer(source):
        raise AudioError("lfs_pointer", files.LFS_ADVICE)
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


def _check_duration(duration_s: float, max_duration_s: float) -> None:
    if duration_s > max_duration_s:
        raise AudioError("too_long", f"{duration_s:.1f} s, at most {max_duration_s:g} s can be used")


def _finite(block: np.ndarray) -> np.ndarray:
    if not np.isfinite(block).all():
        raise AudioError("not_finite", "the recording holds NaN or infinite samples")
    return block


def _check_header(rate_hz: int, channels: int) -> None:
    if rate_hz > MAX_RATE_HZ or channels > MAX_CHANNELS:
        raise AudioError(
            "unreadable",
            f"{channels} channel(s) at {rate_hz} Hz; at most {MAX_CHANNELS} at {MAX_RATE_HZ} Hz can be used",
        )


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Scale integers to -1 to 1; leave floats as they are."""
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max + 1)
    return samples.astype(np.float32, copy=False)


def _mono(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 1:
        return samples
    # a mean over one channel would take a tenth of the time of decoding
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def _resample(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    import soxr

    return soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
