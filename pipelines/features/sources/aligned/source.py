"""Long recordings with texts beside them as a corpus of clips.

    talks/monday.mp3    a recording of any length
          monday.srt    its text: .srt, .vtt, .txt, .TextGrid or .eaf

Hypotheses are stored in the lab's cache folder for each recording and model: a run that was interrupted decodes no
window twice. What cannot be used is an example without audio, which becomes a row of `rejected.csv`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.features.sources import SPLITS, Example, NoAudio, PartExample
from pipelines.features.sources.aligned import hypotheses, matching, passages, texts
from pipelines.features.sources.aligned.passages import Passage
from pipelines.features.sources.draw import Draw, draw_splits
from pipelines.features.sources.folder_tables import inside, refuse_outside_folders
from pipelines.features.sources.splits import describe, path_splits
from pipelines.features.sources.stamps import stamp_all
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError, Waveform, fingerprint
from pipelines.speech.audio_files import find_audio
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.pieces import Piece, read_piece
from pipelines.speech.text import same_speakers
from pipelines.whisper import model as whisper_model
from pipelines.whisper.engines.forced import ForcedLine

logger = logging.getLogger(__name__)

_LANGUAGE = re.compile(r"\.[a-z]{2,3}([-_][a-z]{2})?", re.IGNORECASE)
CODE_VERSION = "3"
"""Raised when the same recording and text would give other clips."""


@dataclass(frozen=True)
class AlignedSource:
    """The corpus in the folder `path`, aligned by the model `aligner`. Folders name the splits, else `seed` draws."""

    path: str
    aligner: str = "openai/whisper-tiny"
    min_logprob: float = -9.0
    language: str = "sv"
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return digests of recordings and texts, the weights of the aligner and the settings; nothing is decoded."""
        files = sorted(path for pair in self._pairs for path in pair)
        files_by, digest = stamp_all(self._folder, files)
        model = whisper_model.identity(self._model)
        return {
            "kind": "aligned",
            "seed": str(self.seed),
            "files_by": files_by,
            "files_sha256": digest,
            "code.aligned": CODE_VERSION,
            "min_logprob": str(self.min_logprob),
            **({"detector": cutter} if (cutter := detection.substitute()) else {}),
            **{f"aligner.{name}": str(value) for name, value in model.items()},
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the clips of these splits, recording by recording, and what was rejected."""
        return (example for example in self._corpus[0] if example.split in splits)

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is read on access."""
        return self.examples()

    @property
    def shared_speakers(self) -> frozenset[str]:
        """Speakers in several splits, because sentences were drawn and not speakers."""
        return self._corpus[1]

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _model(self) -> whisper_model.ModelRef:
        return whisper_model.resolve(self.aligner)

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        return find_pairs(self._folder)

    @cached_property
    def _corpus(self) -> tuple[list[Example], frozenset[str]]:
        pieces = [(audio, passage) for audio, text in self._pairs for passage in self._passages(audio, text)]
        pieces.sort(key=lambda one: bool(one[1].reason))  # the clips first: only they are drawn
        n_clips = sum(not passage.reason for _, passage in pieces)
        files = [audio.relative_to(self._folder) for audio, _ in pieces]
        speakers = same_speakers(passage.speaker for _, passage in pieces)
        by_folder = path_splits(self.path, files)
        if by_folder or not n_clips:
            drawn = Draw(by_folder or ["train"] * len(pieces), "")
        else:
            stems = [file.with_suffix("").as_posix() for file in files]
            texts_of_clips = [passage.text for _, passage in pieces[:n_clips]]
            drawn = draw_splits(speakers[:n_clips], stems[:n_clips], texts_of_clips, self.seed)
            drawn = replace(drawn, splits=[*drawn.splits, *["train"] * (len(pieces) - n_clips)])
        logger.info(f"{self.path}: {n_clips:,} clips of {len(pieces):,} passages, {describe(drawn.splits[:n_clips])}")
        examples = [
            _example(n, self._folder, audio, passage, speaker, split)
            for n, ((audio, passage), speaker, split) in enumerate(zip(pieces, speakers, drawn.splits, strict=True))
        ]
        return examples, drawn.shared_speakers

    def _passages(self, audio: Path, text: Path) -> list[Passage]:
        """Return the passages of a recording, from the cache folder if it was aligned with this text before."""
        lines = texts.read(text)
        model = json.dumps(whisper_model.identity(self._model), sort_keys=True)
        decoded = _key(
            CODE_VERSION, fingerprint(audio).hex(), model, self.language, *filter(None, [detection.substitute()])
        )
        aligned = _key(decoded, fingerprint(text).hex(), str(self.min_logprob))
        folder = environment.cache_folder() / "aligned"
        stored = manifest.read_json(folder / f"{aligned}.json")
        if stored is not None:
            return [Passage(**passage) for passage in stored["passages"]]
        logger.info(f"aligning {audio.relative_to(self._folder)} with {len(lines):,} lines of {text.name}")
        try:
            recording = hypotheses.decode(audio, folder / f"{decoded}.jsonl", open_aligner(self._model, self.language))
        except AudioError as error:
            return [Passage(0, 0, "", "", 0, 0, error.reason, error.detail)]
        predicted = matching.predict(lines, recording.windows)
        result = list(passages.find_passages(audio, recording, lines, predicted, self._force, self.min_logprob))
        manifest.write_json(folder / f"{aligned}.json", {"passages": [asdict(passage) for passage in result]})
        return result

    def _force(self, path: Path, start_s: float, end_s: float, lines: list[str]) -> list[ForcedLine]:
        from pipelines.whisper.engines import forced

        engine = open_aligner(self._model, self.language)
        return forced.force(engine, engine.log_mel(Waveform(read_piece(path, start_s, end_s))), lines)


@functools.lru_cache(maxsize=1)
def open_aligner(ref: whisper_model.ModelRef, language: str) -> Any:
    """Return the aligner in float32, so that every machine finds the same clips within rounding."""
    from pipelines.whisper.engines import open_engine

    engine = open_engine(ref, language, "transformers")
    if not engine.can_align:
        raise LabError(f"source.aligner {ref.title} names no alignment heads: take another model, such as its base")
    return engine


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return each recording with its text, sorted.

    Raises LabError if there is none, if one has two texts, or if a file is a link out of the folder.
    """
    if not folder.is_dir():
        raise LabError(f"source.path must name a folder of recordings, got {str(folder)!r}, which is none: correct it")
    refuse_outside_folders(folder)
    pairs, recordings = [], find_audio(folder).files
    texts_by_stem = _texts_of(recordings)
    for audio in recordings:
        beside = texts_by_stem.get(audio.with_suffix(""), [])
        if len(beside) > 1:
            raise LabError(f"{audio} must have one text, got {' and '.join(p.name for p in beside)}: remove one")
        if beside:
            for path in (audio, beside[0]):
                inside(folder, path.relative_to(folder), path.name)
            pairs.append((audio, beside[0]))
        else:
            logger.info(f"note: {audio.relative_to(folder)} has no text beside it and is not used")
    if not pairs:
        raise LabError(
            f"{folder} must hold recordings with a text of the same name ({', '.join(texts.SUFFIXES)}), got none: "
            "add one, such as talk.srt beside talk.mp3"
        )
    return pairs


def _texts_of(recordings: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the texts by path of recording without suffix: `talk.srt` and `talk.sv.srt` belong to `talk.mp3`."""
    stems, texts_by_stem = {audio.with_suffix("") for audio in recordings}, defaultdict(list)
    for folder in {audio.parent for audio in recordings}:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in texts.SUFFIXES and path.is_file():
                stem = path.with_suffix("")
                is_exact = stem in stems or not _LANGUAGE.fullmatch(stem.suffix)
                texts_by_stem[stem if is_exact else stem.with_suffix("")].append(path)
    return texts_by_stem


def _example(n: int, folder: Path, audio: Path, passage: Passage, speaker: str, split: str) -> Example:
    stem = audio.relative_to(folder).as_posix()
    if passage.reason:
        detail = f"{passage.start_s:.1f} to {passage.end_s:.1f} s: {passage.detail}"
        name, sound = f"{stem}@{passage.start_s:.2f}-{passage.end_s:.2f}#{n}", NoAudio(passage.reason, detail)
        return Example(name, split, passage.text or passage.reason, sound, speaker)
    meta = {"score": f"{passage.logprob:.3f}", "start_s": f"{passage.start_s:.2f}"}
    piece = Piece(passage.start_s, passage.end_s)
    return PartExample(
        f"{stem}@{passage.start_s:.2f}-{passage.end_s:.2f}", split, passage.text, audio, speaker, meta, piece
    )


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
