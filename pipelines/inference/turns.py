"""Decode live audio and cut it into turns: from the first word to a silence of some length.

Each turn is one or more windows. They are cut at the pauses at which the model was trained to start and end
(segmentation.PAUSE_S for models of single sentences). All of them are final: later samples do not change them.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from pipelines.inference.transcriber import Transcriber
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.detection import Detector
from pipelines.speech.recordings.segmentation import PAUSE_S, START, Window, WindowCutter

PCM, ULAW, ALAW = "audio/pcm", "audio/pcmu", "audio/pcma"
"""Encodings of live audio: 16-bit PCM in little-endian order, and the two of telephones (G.711)."""
_SUBTYPES = {PCM: "PCM_16", ULAW: "ULAW", ALAW: "ALAW"}
"""Their names in libsndfile."""

_STEP = SAMPLE_RATE_HZ // 10
"""Samples after which the state is read, so that a long block yields its turns in order."""


class Mark(Enum):
    """What happened in the samples of a call."""

    STARTED = "speech has started"
    WINDOW = "a window of the turn is complete"
    STOPPED = "the turn has ended"


@dataclass(frozen=True)
class TurnEvent:
    """An event of a turn, at a time in seconds since the first sample."""

    mark: Mark
    time_s: float
    window: Window | None = None


@dataclass(frozen=True)
class TurnSettings:
    """When a turn starts and ends."""

    threshold: float = 0.5
    """Probability of speech, 0.01 to 0.99, at which a turn starts. A higher one needs clearer speech."""
    padding_s: float = 0.3
    """Audio before and after the speech that belongs to the turn."""
    silence_s: float = 0.5
    """Silence that ends a turn."""


class TurnCutter:
    """Finds the turns of one speaker's samples, in constant memory. Not thread-safe."""

    def __init__(self, transcriber: Transcriber, settings: TurnSettings, n_before: int = 0):
        """`n_before` is the number of earlier samples, which the times of events include."""
        self.settings = settings
        self._transcriber = transcriber
        self._n_before = n_before
        """Samples before those of the current WindowCutter."""
        self._start()

    def feed(self, samples: np.ndarray) -> list[TurnEvent]:
        """Return the events in `samples`, float32 [n] at 16 kHz, which follow those of the last call."""
        events: list[TurnEvent] = []
        for at in range(0, len(samples), _STEP):
            step = samples[at : at + _STEP]
            self._n_fed += len(step)
            events += self._events(list(self._cutter.feed(step)))
        return events

    def finish(self) -> list[TurnEvent]:
        """Return the last events of the samples so far; the next samples start afresh."""
        events = self._events(list(self._cutter.finish()))
        if self._is_open:
            events.append(self._event(Mark.STOPPED, min(self._cutter.last_end, self._n_fed)))
        self.clear()
        return events

    def clear(self) -> None:
        """Forget the open turn."""
        self._n_before += self._n_fed
        self._start()

    def _start(self) -> None:
        is_clip = self._transcriber.ref.context == "clip"
        silence_s = self.settings.silence_s
        detector = _Thresholded(detection.open_detector(), self.settings.threshold)
        self._cutter = WindowCutter(
            detector, self._transcriber.longest_s, pause_s=min(PAUSE_S, silence_s) if is_clip else silence_s
        )
        self._cutter.pad = int(self.settings.padding_s * SAMPLE_RATE_HZ)
        self._is_open, self._n_fed = False, 0

    def _events(self, windows: list[Window]) -> list[TurnEvent]:
        """Return the events after the cutter has returned `windows`."""
        events: list[TurnEvent] = []
        start, _ = self._cutter.open_stretch()
        starts = [round(window.start_s * SAMPLE_RATE_HZ) for window in windows] + ([] if start is None else [start])
        if starts and not self._is_open:
            self._is_open = True
            events.append(self._event(Mark.STARTED, starts[0]))
        for window in windows:
            event = self._event(Mark.WINDOW, round(window.end_s * SAMPLE_RATE_HZ))
            events.append(TurnEvent(event.mark, event.time_s, window))
        speech_end = self._cutter.last_end - self._cutter.pad
        n_silent = self._cutter.position - speech_end
        if self._is_open and self._cutter.start is None and n_silent >= self.settings.silence_s * SAMPLE_RATE_HZ:
            self._is_open = False
            events.append(self._event(Mark.STOPPED, self._cutter.last_end))
        return events

    def _event(self, mark: Mark, position: int) -> TurnEvent:
        return TurnEvent(mark, (self._n_before + position) / SAMPLE_RATE_HZ)


@dataclass
class _Thresholded:
    """A detector whose probability `threshold` counts as segmentation.START."""

    detector: Detector
    threshold: float

    def reset(self) -> None:
        self.detector.reset()

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        probabilities = self.detector.probabilities(samples)
        return np.interp(probabilities, [0, self.threshold, 1], [0, START, 1]).astype(np.float32)


class AudioDecoder:
    """Decodes one speaker's audio, which arrives in parts, to mono float32 at 16 kHz. Not thread-safe."""

    def __init__(self, encoding: str, rate_hz: int):
        self.encoding, self.rate_hz = encoding, rate_hz
        self._resampler: Any = None

    def decode(self, encoded: Any) -> np.ndarray:
        """Return the samples of the next part, a string of base64. Raises ValueError with the reason."""
        import soundfile

        if not isinstance(encoded, str):
            raise ValueError("must be a string of base64")
        try:
            content = base64.b64decode(encoded, validate=True)
        except ValueError:
            raise ValueError("is not base64") from None
        if self.encoding == PCM and len(content) % 2:
            raise ValueError("has half a sample: 16-bit PCM has two bytes for each")
        samples = np.zeros(0, dtype=np.float32)
        if content:
            raw = {"samplerate": self.rate_hz, "channels": 1, "format": "RAW", "subtype": _SUBTYPES[self.encoding]}
            samples, _ = soundfile.read(io.BytesIO(content), dtype="float32", endian="LITTLE", **raw)
        return self._resample(samples, last=False)

    def flush(self) -> np.ndarray:
        """Return the samples that the resampler still holds; the next part starts afresh."""
        samples = self._resample(np.zeros(0, dtype=np.float32), last=True)
        self._resampler = None
        return samples

    def _resample(self, samples: np.ndarray, *, last: bool) -> np.ndarray:
        import soxr

        if self.rate_hz == SAMPLE_RATE_HZ or (last and self._resampler is None):
            return samples
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(self.rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
        return self._resampler.resample_chunk(samples, last=last)
