"""Align one recording with its text. What is computed is stored in the lab's cache folder and not computed again."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.features.sources.aligned import hypotheses, matching, passages, texts
from pipelines.features.sources.aligned.passages import Passage
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.speech.audio import AudioError, Waveform, fingerprint
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.pieces import read_piece
from pipelines.whisper import model as whisper_model
from pipelines.whisper.engines.forced import ForcedLine
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

_MIN_PROBABILITY = 0.7
"""Of another language. From 5 s on, whisper-tiny reached it for none of 40 parts in Swedish, 10 of 12 in English and 2
of 4 in German (three sentences of espeak-ng each). With 0.5 it takes 4 of the 40 for others, one of them for Danish."""

CODE_VERSION = "7"
"""Raised when the same windows, text and models would give other passages."""


@dataclass(frozen=True)
class Aligner:
    """The models and the limit by which recordings are aligned. It can be pickled."""

    ref: ModelRef
    """Decodes the recordings."""
    language: str
    min_logprob: float
    """Of every token of a clip's text."""
    judge: ModelRef | None = None
    """Scores the texts; None: `ref`."""
    detects_language: bool = False
    """Whether `ref`, untuned and multilingual, is asked for the language of speech that no text fits."""

    def __call__(self, pair: tuple[Path, Path]) -> list[Passage]:
        """Return the passages of a recording and its text, from the cache folder if they were computed before."""
        audio, text = pair
        lines, judge, journal = texts.read(text), self.judge or self.ref, self.journal(audio)
        settings = (fingerprint(text).hex(), str(self.min_logprob), *([_identity(judge)] if self.judge else []))
        if self.detects_language:
            settings += ("language",)
        file = folder() / f"{_key(CODE_VERSION, journal.stem, *settings)}.json"
        stored = manifest.read_json(file)
        if stored is not None:
            return [Passage(**passage) for passage in stored["passages"]]
        logger.info(f"aligning {audio.name} with {len(lines):,} lines of {text.name}")
        try:
            engine = partial(open_aligner, self.ref, self.language)
            recording = hypotheses.decode(audio, journal, engine)
        except AudioError as error:
            return [Passage(0, 0, "", "", 0, 0, error.reason, error.detail)]
        predicted = matching.predict(lines, recording.windows)
        force = partial(_force, judge, self.language)
        result = list(passages.find_passages(audio, recording, lines, predicted, force, self.min_logprob, self._other))
        manifest.write_json(file, {"passages": [asdict(passage) for passage in result]})
        return result

    def _other(self, path: Path, start_s: float, end_s: float) -> str:
        """Return the name and the probability of another language that is spoken in a part, "" if there is none."""
        if not self.detects_language:
            return ""
        engine = open_aligner(self.ref, self.language)
        log_mel = engine.log_mel(Waveform(read_piece(path, start_s, min(end_s, start_s + hypotheses.LONGEST_S))))
        probabilities = engine.language_probabilities(log_mel.padded(FULL_FRAMES))
        likeliest = max(probabilities, key=probabilities.__getitem__)
        if likeliest == self.language or probabilities[likeliest] < _MIN_PROBABILITY:
            return ""
        return f"{languages.NAMES[likeliest].title()} (probability {probabilities[likeliest]:.2f})"

    def journal(self, audio: Path) -> Path:
        """Return the file with the windows of a recording that are decoded (sources/journal.py)."""
        substitute = filter(None, [detection.substitute()])
        recording = (fingerprint(audio).hex(), _identity(self.ref), self.language, *substitute)
        return folder() / f"{_key(hypotheses.CODE_VERSION, *recording)}.jsonl"


def folder() -> Path:
    """Return the folder of all that was computed."""
    return environment.cache_folder() / "aligned"


@functools.lru_cache(maxsize=2)
def open_aligner(ref: ModelRef, language: str) -> Any:
    """Return the aligner in float32, so that every machine finds the same clips within rounding."""
    from pipelines.whisper.engines import open_engine

    engine = open_engine(ref, language, "transformers")
    if not engine.can_align:
        raise LabError(f"source.aligner {ref.title} names no alignment heads: take another model, such as its base")
    return engine


def _force(
    ref: ModelRef, language: str, path: Path, start_s: float, end_s: float, lines: list[str]
) -> list[ForcedLine]:
    from pipelines.whisper.engines import forced

    engine = open_aligner(ref, language)
    return forced.force(engine, engine.log_mel(Waveform(read_piece(path, start_s, end_s))), lines)


def _identity(ref: ModelRef) -> str:
    return json.dumps(whisper_model.identity(ref), sort_keys=True)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
