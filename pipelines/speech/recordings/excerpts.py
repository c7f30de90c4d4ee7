"""Rows that are a part of a recording: columns `start` and `end`, or `offset` and `duration`, and their synonyms.

| meaning | names in any case, also with `_time`, and with `_s` (the default) or `_ms` |
|---|---|
| start | start, begin, offset (NeMo), onset, starttid |
| end | end, stop, slut, sluttid; offset, beside onset |
| duration | duration, dur |
| both | from and to, in and out, t0 and t1, tmin and tmax, xmin and xmax, if a table has both |

A name may begin with segment, clip, audio or utterance, as in `segment_start`.

A duration without a start is the end in a manifest of NeMo (`audio_filepath`). In other tables it is information, and
a recording that is longer is refused: the text may belong to a part of it.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.infra.tables import Cells, is_missing
from pipelines.speech import audio, channels
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, DamagedAudio, Gap

REASON = "bad_segment"
TOLERANCE_S = 0.2
"""An end may be so much after the end of the recording: people round, and containers state other durations."""
_PAIRS = {"from": "to", "in": "out", "t0": "t1", "tmin": "tmax", "xmin": "xmax"}
_START = ("starttid", "start", "begin", "offset", "onset", *_PAIRS)
_END, _DURATION = ("end", "stop", "sluttid", "slut", *_PAIRS.values()), ("duration", "dur")
_NAME = re.compile(
    r"(?:(?:segment|seg|clip|audio|utterance|utt)[_ ]?)?"
    rf"({'|'.join((*_START, *_END, *_DURATION))})(?:[_ ]?times?(?:tamps?)?)?"
    r"(?:[_ ]?[(\[]?(s|secs?|seconds?|ms|msecs?|millis|milliseconds?|samples?|frames?|idx|index)[)\]]?)?"
)
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:[.,]\d+)?)")
"""`1.5`, `1,5` (Swedish Excel), `1:02.5` or `0:01:02,5`."""


@dataclass(frozen=True)
class Excerpt:
    """A part of a recording, in seconds. `problem` says why a row's cells state none."""

    start_s: float = 0.0
    end_s: float | None = None
    """None: the end of the recording."""
    may_be_longer: bool = False
    """The end may be after that of the recording."""
    stated_s: float | None = None
    """The duration of the whole recording as the table states it."""
    problem: str = ""
    reason: str = REASON
    """Reason of the AudioError for a problem."""

    @property
    def is_part(self) -> bool:
        """Return True if the row states where its part begins or ends."""
        return bool(self.start_s) or self.end_s is not None

    def __str__(self) -> str:
        return f"{self.start_s:g}-{'' if self.end_s is None else f'{self.end_s:g}'}"

    def cut(self, source: bytes | Path, keep_channels: bool = False) -> bytes:
        """Return the part as a wav file: 16 kHz, float32, without loss; mono or with all channels.

        Raises AudioError as `audio.blocks` does, and with the reason REASON if the recording has no such part.
        """
        import soundfile

        if self.problem:
            raise AudioError(self.reason, self.problem)
        samples, gaps = _decoded(source, keep_channels)
        duration_s = len(samples) / SAMPLE_RATE_HZ
        if self.stated_s is not None and duration_s > self.stated_s + max(TOLERANCE_S, 0.05 * duration_s):
            raise AudioError(
                REASON,
                f"the table states a duration of {self.stated_s:g} s, the recording lasts {duration_s:.3f} s: add a "
                "column offset to cut it, or remove the column duration",
            )
        end_s = duration_s if self.end_s is None else self.end_s
        if gaps and gaps[-1].end_s is None and end_s >= gaps[-1].start_s:
            raise DamagedAudio(gaps[-1:])
        if self.start_s >= duration_s or (end_s > duration_s + TOLERANCE_S and not self.may_be_longer):
            hint = "; are the times in milliseconds? Then name the columns start_ms and end_ms"
            raise AudioError(
                REASON,
                f"{self.start_s:g} to {end_s:g} s are not inside the recording of {duration_s:.3f} s"
                + (hint if self.start_s >= 100 * duration_s or end_s >= 100 * duration_s else ""),
            )
        if lost := [gap for gap in gaps if gap.start_s < end_s and (gap.end_s is None or gap.end_s >= self.start_s)]:
            raise DamagedAudio(lost)
        part = samples[round(self.start_s * SAMPLE_RATE_HZ) : round(end_s * SAMPLE_RATE_HZ)]
        file = io.BytesIO()
        soundfile.write(file, part, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
        return file.getvalue()


@dataclass(frozen=True)
class ExcerptColumns:
    """The columns of a table that state parts of recordings: names and seconds per unit; None if there is none."""

    start: tuple[str, float] | None
    end: tuple[str, float] | None
    duration: tuple[str, float] | None
    is_nemo: bool = False

    @property
    def names(self) -> list[str]:
        return [column[0] for column in (self.start, self.end, self.duration) if column]

    def excerpt(self, cells: Cells) -> Excerpt | None:
        """Return the part that a row states, or None for the whole recording."""
        if self.duration and not (self.start or self.end or self.is_nemo):
            stated_s = _seconds(cells.get(self.duration[0]), self.duration[1])
            return Excerpt(stated_s=stated_s) if isinstance(stated_s, float) and stated_s > 0 else None
        values = []
        for column in (self.start, self.end, self.duration):
            value = _seconds(cells.get(column[0]), column[1]) if column else None
            if isinstance(value, str):
                return Excerpt(problem=f"{column[0]} must be a time such as 1.5, got {value!r}")
            values.append(value)
        start, end, duration = values
        if end == -1:  # Kaldi: the end of the recording
            end = None
        if start is None and end is None and (duration is None or self.end):
            return None
        only_duration = start is None and end is None
        if end is None and duration is not None:
            end = (start or 0.0) + duration
        if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
            return Excerpt(problem=f"a part must start at 0 or later and end after its start, got {start} to {end} s")
        return Excerpt(start or 0.0, end, may_be_longer=only_duration)


def find_columns(columns: Iterable[str]) -> ExcerptColumns | None:
    """Return the columns that state parts of recordings, or None. Raises LabError if their unit is samples."""
    columns = list(columns)
    lower = [column.strip().lower() for column in columns]
    words = {match[1] for match in map(_NAME.fullmatch, lower) if match}
    has_onset = any(name.startswith("onset") for name in lower)
    roles: dict[str, tuple[str, float]] = {}
    for column, name in zip(columns, lower, strict=True):
        match = _NAME.fullmatch(name)
        if not match:
            continue
        word, unit = match[1], match[2] or "s"
        if any(word in pair and not {*pair} <= words for pair in _PAIRS.items()):
            continue
        if unit.startswith(("sample", "frame", "idx", "index")):
            raise LabError(
                f"the column {column!r} must state seconds or milliseconds, got {unit}: write a column "
                f"{word}_s (samples divided by the sampling rate), or remove it"
            )
        is_end = word in _END or (word == "offset" and has_onset)
        role = "duration" if word in _DURATION else "end" if is_end else "start"
        roles.setdefault(role, (column, 0.001 if unit.startswith("m") else 1.0))
    parts = roles.get("start"), roles.get("end"), roles.get("duration")
    return ExcerptColumns(*parts, is_nemo="audio_filepath" in lower) if roles else None


def _seconds(value: Any, scale: float) -> float | str | None:
    """Return a cell in seconds, None if it is empty, or the cell itself as text if it is no time."""
    if is_missing(value):
        return None
    text = str(value).strip()
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    match = _CLOCK.fullmatch(text.removesuffix("s").strip() if scale == 1.0 else text.removesuffix("ms").strip())
    if not match or isinstance(value, bool):
        return str(value)[:40]
    hours, minutes, seconds = (float((part or "0").replace(",", ".")) for part in match.groups())
    result = sign * (hours * 3600 + minutes * 60 + seconds) * (scale if ":" not in text else 1.0)
    return result if math.isfinite(result) else str(value)[:40]


_Decoded = tuple[np.ndarray, tuple[Gap, ...]]
"""All samples of a recording, float32 [n] or [n, channels] at 16 kHz, and its parts that cannot be read."""


def _decoded(source: bytes | Path, keep_channels: bool) -> _Decoded:
    """Return a recording; the last file is kept for its next rows."""
    if isinstance(source, bytes):
        return _decode(source, keep_channels)
    try:
        state = source.stat()
    except (OSError, ValueError):
        return _decode(source, keep_channels)
    return _decoded_file(str(source), state.st_size, state.st_mtime_ns, keep_channels)


@functools.lru_cache(maxsize=1)
def _decoded_file(path: str, size: int, modified_ns: int, keep_channels: bool) -> _Decoded:
    return _decode(Path(path), keep_channels)


def _decode(source: bytes | Path, keep_channels: bool) -> _Decoded:
    if keep_channels:
        return channels.decode(source)
    blocks: list[np.ndarray] = []
    try:
        blocks.extend(audio.blocks(source))
    except DamagedAudio as error:
        return np.concatenate([np.zeros(0, np.float32), *blocks]), error.gaps
    return np.concatenate(blocks), ()
