"""Decode audio from bytes or a path to a Waveform: 16 kHz, mono, float32.

libsndfile decodes what it can read, ffmpeg the rest if it is installed. Neither is trusted with the length of a file:
what it holds is compared with what it claims (decoders/containers.py), and sound that is lost is an AudioError with the
reason `damaged` and the time, never a shorter recording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra import files
from pipelines.speech.decoders import containers, ffmpeg, libsndfile
from pipelines.speech.decoders.content import Content, Layout, Piece, Request, open_content
from pipelines.speech.decoders.waveform import (
    DAMAGED,
    MAX_CHANNELS,
    MAX_LEVEL,
    MAX_RATE_HZ,
    SAMPLE_RATE_HZ,
    AudioError,
    DamagedAudio,
    Gap,
    Mix,
    Waveform,
    check_duration,
    to_mono,
)

__all__ = [
    "DAMAGED",
    "MAX_CHANNELS",
    "MAX_LEVEL",
    "MAX_RATE_HZ",
    "SAMPLE_RATE_HZ",
    "AudioError",
    "DamagedAudio",
    "Gap",
    "Mixed",
    "Waveform",
    "blocks",
    "decode",
    "fingerprint",
    "from_array",
]

BLOCK_S = 30.0
"""Duration of the blocks in which `blocks` decodes a recording."""


@dataclass(frozen=True)
class Mixed:
    """A recording of which `blocks` makes one channel in a certain way, for example by selecting one."""

    source: bytes | Path | str
    mix: Mix


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
    """Decode a clip: the mean of its channels, or a loud one if they cancel, at 16 kHz.

    Raises AudioError with reason `missing`, `empty`, `lfs_pointer`, `unreadable`, `damaged`, `too_long` (checked in the
    header before decoding, and again in the decoded samples) or `not_finite`; Unavailable if the file cannot be read
    at the moment.
    """
    with open_content(source) as content:
        layout = containers.examine(content)
        if layout.is_plain:
            try:
                samples, rate_hz = libsndfile.read(content, layout.pieces[0], max_duration_s)
            except libsndfile.ERRORS as error:
                if isinstance(error, AudioError):
                    raise
            else:
                return from_array(samples, rate_hz, max_duration_s)
        joined = np.concatenate(list(_blocks(content, layout, Request(0, max_duration_s, BLOCK_S))))
    return Waveform(np.ascontiguousarray(joined))


def blocks(
    source: bytes | Path | str | Mixed, max_duration_s: float = float("inf"), block_s: float = BLOCK_S, track: int = 0
) -> Iterator[np.ndarray]:
    """Yield the samples of a recording of any length in constant memory: float32 [n] at 16 kHz, block by block.

    Files that libsndfile cannot read are decoded by ffmpeg if that is installed, including one audio `track` of a video
    (1: the first; 0: the first, and further ones are logged). Raises AudioError as `decode` does, at the block with the
    fault, and `no_track`; DamagedAudio after the last block, if parts of the recording cannot be read. The blocks then
    hold the rest, with silence in place of those parts.
    """
    source, mix = (source.source, source.mix) if isinstance(source, Mixed) else (source, None)
    with open_content(source) as content:
        yield from _blocks(content, containers.examine(content), Request(track, max_duration_s, block_s, mix))


def _blocks(content: Content, layout: Layout, request: Request) -> Iterator[np.ndarray]:
    n_samples, gaps, hints = 0, [], []
    for piece in layout.pieces:
        if piece.before_s:
            lost = np.zeros(round(piece.before_s * SAMPLE_RATE_HZ), dtype=np.float32)
            gaps.append(Gap(n_samples / SAMPLE_RATE_HZ, (n_samples + len(lost)) / SAMPLE_RATE_HZ))
            n_samples += len(lost)
            yield lost
        start_s = n_samples / SAMPLE_RATE_HZ
        rest = replace(request, max_duration_s=request.max_duration_s - start_s)
        decoded = _piece_blocks(content, layout, piece, rest)
        try:
            n_new, (new, hint) = yield from _forward(decoded)
        except AudioError as error:
            if error.reason not in ("unreadable", DAMAGED) or not n_samples:
                raise
            gaps.append(Gap(start_s))  # a file behind others, of which nothing can be read
            continue
        n_samples += n_new
        if piece.is_cut:
            new.append(Gap(n_new / SAMPLE_RATE_HZ))
        for gap in new:
            gaps.append(Gap(start_s + gap.start_s, None if gap.end_s is None else start_s + gap.end_s))
        hints += [hint] if hint else []
    if gaps:
        raise DamagedAudio(gaps, hints[0] if hints else "")
    if not n_samples:
        raise AudioError("empty", "the clip holds no samples")


def _piece_blocks(
    content: Content, layout: Layout, piece: Piece, request: Request
) -> Generator[np.ndarray, None, tuple[list[Gap], str]]:
    """Yield the blocks of a piece; return its gaps, in seconds from its start, and what to do about them."""
    if piece.is_cut and piece.duration_s == 0:
        return [], ""
    gaps, n_samples, fault, has_ffmpeg = list(piece.gaps), 0, "", ffmpeg.is_installed()
    if not (layout.only_ffmpeg and has_ffmpeg):
        n_samples, fault = yield from _forward(libsndfile.blocks(content, piece, request))
        if not fault and request.track > 1:
            raise AudioError("no_track", f"there is no audio track {request.track}, the file has 1")
        if not fault:
            return gaps, ""
    if not has_ffmpeg and not n_samples:
        raise AudioError(
            "unreadable",
            f"not audio that libsndfile can read ({fault}); ffmpeg, which reads others and video files, is not "
            "installed: install it",
        )
    if not has_ffmpeg:
        return [*gaps, Gap(n_samples / SAMPLE_RATE_HZ)], "; ffmpeg, which may read more of it, is not installed"
    # ffmpeg starts from the beginning: skip what was decoded already
    decoded, fault_s = ffmpeg.blocks(content, layout, piece, request, bool(n_samples)), n_samples / SAMPLE_RATE_HZ
    try:
        n_samples, new = yield from _forward(decoded, skip=n_samples)
    except AudioError as error:
        if error.reason != "unreadable" or not n_samples:
            raise
        new = [Gap(fault_s)]
    else:
        if fault_s and not new and n_samples / SAMPLE_RATE_HZ > fault_s + piece.tolerance_s:
            new = [Gap(fault_s, fault_s)]
    if (piece.duration_s or 0.0) - n_samples / SAMPLE_RATE_HZ > piece.tolerance_s:
        new.append(Gap(n_samples / SAMPLE_RATE_HZ))
    return [*gaps, *new], ""


def _forward(decoded: Generator[np.ndarray, None, Any], skip: int = 0) -> Generator[np.ndarray, None, tuple[int, Any]]:
    """Yield the samples of a decoder after the first `skip`; return their number, those included, and its result."""
    n_samples = 0
    while True:
        try:
            block = next(decoded)
        except StopIteration as end:
            return n_samples, end.value
        n_samples += len(block)
        if n_samples > skip:
            yield block[max(len(block) - (n_samples - skip), 0) :]


def from_array(samples: np.ndarray, rate_hz: int, max_duration_s: float = float("inf")) -> Waveform:
    """Return a Waveform from samples [n] or [n, channels] (float, or integers at full scale) at `rate_hz`.

    Raises AudioError with reason `empty`, `not_finite` or `too_long`.
    """
    mono = to_mono(_as_float(np.asarray(samples)))
    if mono.size == 0:
        raise AudioError("empty", "the clip holds no samples")
    check_duration(len(mono) / rate_hz, max_duration_s)
    samples = np.ascontiguousarray(_resample(mono, rate_hz), dtype=np.float32)
    if samples.size == 0:
        raise AudioError("empty", f"{len(mono)} sample(s) at {rate_hz} Hz are less than one at {SAMPLE_RATE_HZ} Hz")
    return Waveform(samples)


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Scale integers to -1 to 1; leave floats as they are."""
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max + 1)
    return samples.astype(np.float32, copy=False)


def _resample(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    import soxr

    return soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
