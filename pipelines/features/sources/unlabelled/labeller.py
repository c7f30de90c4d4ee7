"""Decode the windows of a recording with a model in float32, so that every machine writes the same within rounding.

Each window is decoded at its own padded length: the other windows of a batch do not change its text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.features.sources import journal as journals
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform, fingerprint
from pipelines.speech.recordings import detection, segmentation
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper import model as whisper_model
from pipelines.whisper import model_files, tokens
from pipelines.whisper.batching import padded_frames
from pipelines.whisper.decoding_options import MAX_NEW_TOKENS, DecodingOptions
from pipelines.whisper.model import ModelRef

CODE_VERSION = "1"
"""Raised when the same model and recording would give other texts."""
BEAMS = 5
GREEDY, BEAM_SEARCH, LANGUAGE = "greedy", f"{BEAMS} beams", "language"
"""What a labeller writes: the likeliest text by greedy decoding or by beam search, or the code of the language."""


@dataclass(frozen=True)
class Labeller:
    """A model that decodes recordings in windows of at most `window_s` seconds and stores what it wrote."""

    ref: ModelRef
    language: str
    window_s: float
    mode: str = GREEDY

    def decode(
        self, path: Path, folder: Path, on_window: Callable[[float], None] = lambda end_s: None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the records of a recording's windows, and what is known of the recording (see journal.decode).

        A record has start_s, end_s and either `language`, or text, logprob, tokens, and words with log-probabilities.
        What is stored in `folder` is not decoded again. `on_window` receives the end of each window that is decoded
        now. Raises AudioError for a recording that cannot be decoded.
        """

        def decode_windows(windows: list[Window]) -> Iterator[dict[str, Any]]:
            for record in self._decoded(windows):
                yield record
                on_window(record["end_s"])

        return journals.decode(path, self._journal(path, folder), self._cut, decode_windows)

    def _journal(self, path: Path, folder: Path) -> Path:
        model = json.dumps(whisper_model.identity(self.ref), sort_keys=True)
        settings = (self.ref.context, self.language, self.mode, f"{self.window_s:g}")
        cutter = filter(None, [detection.substitute()])
        key = "\n".join((CODE_VERSION, fingerprint(path).hex(), model, *settings, *cutter))
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jsonl"

    def _cut(self, blocks: Iterator[np.ndarray]) -> Iterator[Window]:
        detector, longest_s = detection.open_detector(), self.window_s
        return segmentation.windows_or_whole(blocks, detector, longest_s, cut_s=longest_s, joined_s=longest_s)

    def _decoded(self, windows: list[Window]) -> Iterator[dict[str, Any]]:
        engine = open_labeller(self.ref, self.language)
        log_mels = [engine.log_mel(Waveform(window.samples)) for window in windows]
        lengths = [self._n_frames(len(log_mel.frames)) for log_mel in log_mels]
        contents: dict[int, dict[str, Any]] = {}
        for length in sorted({*lengths}):
            rows = [row for row, n_frames in enumerate(lengths) if n_frames == length]
            features = np.stack([log_mels[row].padded(length) for row in rows])
            contents |= zip(rows, self._contents(engine, features), strict=True)
        for row, window in enumerate(windows):
            yield {"start_s": window.start_s, "end_s": window.end_s, **contents[row]}

    def _n_frames(self, n: int) -> int:
        """Return the frames at which a window of `n` frames is decoded: its own if the model was tuned on clips."""
        return padded_frames(n) if self.ref.context == "clip" else model_files.source_frames(self.ref.folder)

    def _contents(self, engine: Any, features: np.ndarray) -> list[dict[str, Any]]:
        if self.mode == LANGUAGE:
            return [{"language": engine.detect_language(window)} for window in features]
        beams = BEAMS if self.mode == BEAM_SEARCH else 1
        options = DecodingOptions(self.language, timestamps=False, beam_size=beams, max_new_tokens=MAX_NEW_TOKENS)
        return [
            {
                "text": one.text,
                "logprob": one.logprob,
                "tokens": one.tokens,
                "words": [list(word) for word in one.words],
            }
            for one in engine.decode(features, options)
        ]


@functools.lru_cache(maxsize=2)
def open_labeller(ref: ModelRef, language: str) -> Any:
    """Return the engine of a model (whisper/engines/)."""
    from pipelines.whisper.engines import open_engine

    return open_engine(ref, language, "transformers")


def require_languages(ref: ModelRef) -> None:
    """Raise LabError if a model cannot detect languages."""
    if only := tokens.only_language(ref.folder):
        raise LabError(
            f"source.language_model must know several languages, got {ref.title}, which knows {only} only: take a "
            "multilingual base model, such as openai/whisper-small"
        )
