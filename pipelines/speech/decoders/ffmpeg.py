"""Decode with ffmpeg, which may open the given file only: everything that libsndfile cannot read, also if damaged.

Times are those of the container: where its packets leave a gap, or the sound begins later than the picture, the samples
are zero. ffmpeg goes on after damage. Where it was is found in a second run, which prints the time of every frame.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from pipelines.speech.decoders.content import CHUNK_BYTES, Content, Layout, Piece, Request, Spliced
from pipelines.speech.decoders.waveform import (
    DAMAGED,
    SAMPLE_RATE_HZ,
    AudioError,
    Gap,
    check_duration,
)

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Time that ffmpeg may take for one block."""
MAX_START_S = 600.0
"""A file whose sound begins later is a part of a longer one: its times count from its start."""
_FORMATS = (
    "mov,matroska,webm,avi,flv,mpegts,mpeg,asf,aac,mp3,ogg,flac,wav,w64,aiff,au,caf,amr,3gp,mp4,m4a,ac3,eac3,dts,"
    "tta,wv,ape"
)
"""Containers that ffmpeg may open: none of them refers to other files or addresses."""
_ABSOLUTE_TIMES = ("mp4", "matroska")
"""Kinds of containers whose times count from zero."""
_MIN_GAP_S = {"mp4": 0.03, "flac": 0.03}
"""Kinds of containers whose times are exact; those of others vary by some hundredths of a second."""
_SILENT_LOSS = ("mpegts", "asf")
"""Kinds of containers whose damaged packets ffmpeg drops without an error."""
_MAX_MESSAGES = 50
_JUMP_S = 0.1
"""A larger jump of the times of frames is a gap."""
_TRACK = re.compile(r"\s*Stream #0:\d+(?:\[\w+\])?(?:\((\w+)\))?: Audio: (.*)")
_START = re.compile(r"\s*Duration: .* start: (-?[\d.]+)")
_FAULT = re.compile(r"\[(?:error|fatal|panic)\]|Packet corrupt")
_FRAME = re.compile(r"pts_time:(-?[\d.]+|NOPTS).* rate:(\d+) nb_samples:(\d+)")


def is_installed() -> bool:
    """Return whether ffmpeg can be called."""
    return shutil.which("ffmpeg") is not None


@dataclass
class _Messages:
    """What ffmpeg prints: the tracks of its input, and the errors of decoding."""

    tracks: list[str] = field(default_factory=list)
    start_s: float = 0.0
    faults: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_MESSAGES))
    is_decoding: bool = False
    """Errors before it are of probing, also of pictures and subtitles, and do not count."""
    opened: threading.Event = field(default_factory=threading.Event)

    def read(self, lines: IO[bytes]) -> None:
        """Read all lines, in a thread."""
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            for line in lines:
                self.add(line.decode("utf-8", "replace"))
        self.opened.set()

    def add(self, line: str) -> None:
        text = line.replace("[info]", "")
        if self.is_decoding:
            if _FAULT.search(line):
                self.faults.append(line.strip())
        elif match := _TRACK.match(text):
            self.tracks.append(f"{match[2].strip()} ({match[1]})" if match[1] else match[2].strip())
        elif match := _START.match(text):
            self.start_s = float(match[1])
        elif "Stream mapping:" in line:
            self.is_decoding = True
            self.opened.set()


def blocks(
    content: Content, layout: Layout, piece: Piece, request: Request, is_suspect: bool = False
) -> Generator[np.ndarray, None, list[Gap]]:
    """Yield blocks of float32 [n], mono at 16 kHz, of a piece; return the gaps.

    `is_suspect`: look for gaps although ffmpeg reports none. Raises AudioError `unreadable` or `damaged` if there is no
    sound, `no_track`, `too_long`, `not_finite`.
    """
    with _open_input(content, piece) as (path, inherited):
        for keep_times in (layout.kind in _ABSOLUTE_TIMES, False):
            run = _Run(path, inherited, request, keep_times, _MIN_GAP_S.get(layout.kind, 0.1))
            with run.start() as (process, messages):
                channels = _read_header(process)
                messages.opened.wait(TIMEOUT_S)
                if not (keep_times and messages.start_s > MAX_START_S):
                    n_samples, exit_code = yield from _read_blocks(process, channels, request)
                    break
        _check_track(messages, request.track, content.name)
        if not n_samples:
            raise _no_sound(layout, piece)
        if exit_code < 0:  # killed after TIMEOUT_S: it would hang again
            return [Gap(n_samples / SAMPLE_RATE_HZ)]
        is_suspect |= bool(layout.kind in _SILENT_LOSS or messages.faults or exit_code)
        gaps = run.find_gaps(layout.kind not in _ABSOLUTE_TIMES) if is_suspect else []
        is_unclear = exit_code or (messages.faults and not gaps)
        return [*gaps, Gap(n_samples / SAMPLE_RATE_HZ)] if is_unclear else gaps


def _no_sound(layout: Layout, piece: Piece) -> AudioError:
    if layout.kind == "mp4" and piece.is_cut:
        return AudioError(
            DAMAGED, "it is cut off, and its index, which is at its end, is missing: copy or record it again"
        )
    return AudioError("unreadable", "neither libsndfile nor ffmpeg can read audio in it")


def _check_track(messages: _Messages, track: int, name: str) -> None:
    n_tracks = len(messages.tracks)
    if track == 0 and n_tracks > 1:
        listed = ", ".join(f"{number}: {codec}" for number, codec in enumerate(messages.tracks, 1))
        logger.warning(f"{name} has {n_tracks} audio tracks ({listed}); the first is read, --track selects another")
    if track > max(n_tracks, 1):
        raise AudioError("no_track", f"there is no audio track {track}, the file has {n_tracks}")


@dataclass(frozen=True)
class _Run:
    """The arguments of a run of ffmpeg."""

    path: str
    inherited: tuple[int, ...]
    """File descriptors that it must inherit for the path."""
    request: Request
    keep_times: bool
    """Count times from zero, not from the first packet."""
    min_gap_s: float
    """A shorter gap of the times is not filled."""

    def _command(self, output: list[str]) -> list[str]:
        command = ["ffmpeg", "-nostdin", "-nostats", "-hide_banner", "-loglevel", "level+info"]
        command += ["-protocol_whitelist", "file", "-format_whitelist", _FORMATS]
        # one thread: several report an error before the frames that come before it
        command += ["-threads", "1", "-err_detect", "crccheck", *(["-copyts"] if self.keep_times else [])]
        return [*command, "-i", f"file:{self.path}", "-map", f"0:a:{max(self.request.track, 1) - 1}", *output]

    @contextlib.contextmanager
    def start(self) -> Iterator[tuple[subprocess.Popen, _Messages]]:
        """Decode to standard output, and read what ffmpeg prints in a thread."""
        # async fills gaps of the times with silence; channels stay, since two of them may cancel
        resample = f"aresample={SAMPLE_RATE_HZ}:async=1:min_hard_comp={self.min_gap_s}:first_pts=0"
        if self.request.mix is None:
            resample += ",aformat=channel_layouts=mono|stereo"
        output = ["-af", resample, "-c:a", "pcm_f32le", "-bitexact", "-map_metadata", "-1", "-f", "wav", "pipe:1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pass_fds": self.inherited}
        messages = _Messages()
        with subprocess.Popen(self._command(output), **pipes) as process:
            reader = threading.Thread(target=messages.read, args=(process.stderr,), daemon=True)
            reader.start()
            try:
                yield process, messages
            finally:
                process.kill()
                reader.join(1.0)

    def find_gaps(self, jumps: bool) -> list[Gap]:
        """Decode again and return where frames are missing: ffmpeg prints their times and its errors in one order.

        With `jumps` every jump of the times counts, not only one with an error.
        """
        gaps, end_s, is_faulty, is_decoding = [], 0.0, False, False
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "pass_fds": self.inherited}
        with subprocess.Popen(self._command(["-af", "ashowinfo", "-f", "null", "-"]), **pipes) as process:
            for line in process.stderr:
                text = line.decode("utf-8", "replace")
                is_decoding |= "Stream mapping:" in text
                if not (match := _FRAME.search(text)):
                    is_faulty |= is_decoding and bool(_FAULT.search(text))
                    continue
                start_s = end_s if match[1] == "NOPTS" else float(match[1])
                if is_faulty or (jumps and end_s and start_s - end_s > _JUMP_S):
                    gaps.append(Gap(end_s, max(start_s, end_s)))
                end_s, is_faulty = start_s + int(match[3]) / int(match[2]), False
        return [*gaps, Gap(end_s)] if is_faulty else gaps


def _read_header(process: subprocess.Popen) -> int:
    """Read the header of ffmpeg's wav output; return its number of channels, 0 without output."""
    head = _read(process, 12)
    channels = 0
    while head[:4] == b"RIFF" and len(chunk := _read(process, 8)) == 8 and chunk[:4] != b"data":
        content = _read(process, int.from_bytes(chunk[4:], "little"))
        channels = int.from_bytes(content[2:4], "little") if chunk[:4] == b"fmt " else channels
    return channels


def _read_blocks(
    process: subprocess.Popen, channels: int, request: Request
) -> Generator[np.ndarray, None, tuple[int, int]]:
    """Yield the blocks of ffmpeg's output; return the number of samples, and its exit code (0: it succeeded)."""
    n_samples, frame_bytes = 0, 4 * channels
    while channels and (raw := _read(process, int(request.block_s * SAMPLE_RATE_HZ) * frame_bytes)):
        frames = np.frombuffer(raw[: len(raw) // frame_bytes * frame_bytes], dtype=np.float32)
        n_samples += len(frames) // channels
        check_duration(n_samples / SAMPLE_RATE_HZ, request.max_duration_s)
        yield request.to_mono(frames.reshape(-1, channels), SAMPLE_RATE_HZ)
    return n_samples, process.wait()


def _read(process: subprocess.Popen, n_bytes: int) -> bytes:
    """Read `n_bytes`; fewer at the end of ffmpeg's output, or after TIMEOUT_S, when the process is killed."""
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.daemon = True
    timer.start()
    try:
        return process.stdout.read(n_bytes)
    finally:
        timer.cancel()


@contextlib.contextmanager
def _open_input(content: Content, piece: Piece) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield a path that ffmpeg can open and the file descriptors that it must inherit for that.

    Bytes become a file, not a pipe, because mp4 may store its index at the end. The file is anonymous where the system
    allows it, so nothing is left on the disk if this process is killed.
    """
    if not piece.parts and isinstance(content.source, str):
        yield os.path.abspath(content.source), ()
    elif (anonymous := _anonymous_file()) is not None:
        with anonymous as file:
            _write(file, content, piece)
            yield f"/proc/self/fd/{file.fileno()}", (file.fileno(),)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "recording")
            with open(path, "wb") as file:  # closed before it is read: Windows opens no file twice
                _write(file, content, piece)
            yield path, ()


def _write(file: IO[bytes], content: Content, piece: Piece) -> None:
    if piece.parts:
        shutil.copyfileobj(Spliced(content, piece.parts), file, CHUNK_BYTES)
    else:
        file.write(content.source)
    file.flush()


def _anonymous_file() -> IO[bytes] | None:
    """Return a file in memory; None if the system does not support or allow it."""
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return open(os.memfd_create("recording"), "w+b")
    except OSError:
        return None
