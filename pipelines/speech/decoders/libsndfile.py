"""Decode with libsndfile: wav, flac, mp3, ogg, aiff, au, caf. soxr resamples."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Iterator

import numpy as np

from pipelines.speech.decoders.content import Content, Piece, Request, Spliced
from pipelines.speech.decoders.waveform import SAMPLE_RATE_HZ, AudioError, check_duration, check_header

_MAX_BLOCK_VALUES = 1 << 24
"""Most values, over all channels, that are decoded at a time: 64 MB of float32."""
_STEP_S = 0.25
"""Duration that is decoded at a time near an error: what was decoded of the last step is lost."""
ERRORS = (RuntimeError, ValueError, TypeError, OSError)


@contextlib.contextmanager
def open_sound(content: Content, piece: Piece) -> Iterator[object]:
    """Yield the SoundFile of a piece. Raises AudioError for an implausible header, and the errors of soundfile."""
    import soundfile

    with _open_target(content, piece) as target, soundfile.SoundFile(target, closefd=False) as file:
        check_header(file.samplerate, file.channels)
        yield file


@contextlib.contextmanager
def _open_target(content: Content, piece: Piece) -> Iterator[io.IOBase | str | int]:
    """Yield a path or file descriptor: through Python's file objects decoding takes a tenth longer."""
    if piece.parts:
        yield Spliced(content, piece.parts)
    elif isinstance(content.source, str):
        yield content.source
    elif hasattr(os, "memfd_create"):
        with open(os.memfd_create("clip"), "w+b") as file:
            file.write(content.source)
            file.seek(0)
            yield file.fileno()
    else:
        yield io.BytesIO(content.source)


def read(content: Content, piece: Piece, max_duration_s: float) -> tuple[np.ndarray, int]:
    """Return all samples, float32 [n, channels], and their rate.

    Raises AudioError `too_long` (by the header, before decoding) and the errors of soundfile.
    """
    with open_sound(content, piece) as file:
        check_duration(file.frames / file.samplerate, max_duration_s)
        # one second more than allowed: the header can understate the duration
        max_frames = -1 if max_duration_s == float("inf") else int((max_duration_s + 1) * file.samplerate)
        samples = file.read(max_frames, dtype="float32", always_2d=True)
        if ends_early(file, piece, len(samples)) and len(samples) != max_frames:
            raise ValueError("it ends early")
        return samples, file.samplerate


def ends_early(file: object, piece: Piece, n_frames: int) -> bool:
    """Return whether fewer frames were decoded than the structure of the file shows, or than libsndfile expects."""
    expected_s = file.frames / file.samplerate if piece.duration_s is None else piece.duration_s
    return n_frames / file.samplerate < expected_s - piece.tolerance_s


def blocks(content: Content, piece: Piece, request: Request) -> Generator[np.ndarray, None, str]:
    """Yield blocks of float32 [n], mono at 16 kHz; return why it ended before the end, or "".

    Raises AudioError `too_long` and `not_finite`.
    """
    import soxr

    try:
        with open_sound(content, piece) as file:
            check_duration(file.frames / file.samplerate, request.max_duration_s)
            block_frames = min(int(request.block_s * file.samplerate), _MAX_BLOCK_VALUES // file.channels)
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32")
            same_rate, n_frames, fault = file.samplerate == SAMPLE_RATE_HZ, 0, ""
            while True:
                try:
                    frames = file.read(block_frames, dtype="float32", always_2d=True)
                except ERRORS as error:
                    frames, fault = _read_slowly(content, piece, n_frames, block_frames), describe(error)
                n_frames += len(frames)
                check_duration(n_frames / file.samplerate, request.max_duration_s)
                block = request.to_mono(frames, file.samplerate)
                is_last = bool(fault) or not len(frames)
                yield np.ascontiguousarray(block) if same_rate else resampler.resample_chunk(block, last=is_last)
                if is_last:
                    break
            if fault:
                content.check_available()
            return fault or ("it ends early" if ends_early(file, piece, n_frames) else "")
    except AudioError:
        raise
    except ERRORS as error:
        content.check_available()
        return describe(error)


def _read_slowly(content: Content, piece: Piece, start: int, n_frames: int) -> np.ndarray:
    """Return the frames from `start` on up to the error that reading `n_frames` at once has met."""
    blocks_read: list[np.ndarray] = []
    with contextlib.suppress(*ERRORS), open_sound(content, piece) as file:
        file.seek(start)
        step = int(_STEP_S * file.samplerate)
        for _ in range(-(-n_frames // step)):
            blocks_read.append(file.read(step, dtype="float32", always_2d=True))
    return np.concatenate(blocks_read) if blocks_read else np.zeros((0, 1), dtype=np.float32)


def describe(error: Exception) -> str:
    """Return an error of soundfile in a few words, without paths."""
    import soundfile

    if isinstance(error, soundfile.LibsndfileError):
        text = error.error_string.strip(" .")
        # libsndfile says so of every file whose content it cannot open as the kind that it recognised
        return "its content is damaged" if "does not exist" in text else text
    return f"{type(error).__name__} while decoding: {error}"
