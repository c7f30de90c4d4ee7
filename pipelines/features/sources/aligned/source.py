"""Long recordings with texts beside them as a corpus of clips.

    talks/monday.mp3    a recording of any length
          monday.srt    its text: .srt, .vtt, .txt, .TextGrid or .eaf

Hypotheses are stored in the lab's cache folder for each recording and model: a run that was interrupted decodes no
window twice. What cannot be used is an example without audio, which becomes a row of `rejected.csv`.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pipelines.features.sources import SPLITS, Example, NoAudio, PartExample
from pipelines.features.sources.aligned import adaptation, hypotheses, progress, texts
from pipelines.features.sources.aligned import aligner as aligners
from pipelines.features.sources.aligned.aligner import Aligner
from pipelines.features.sources.aligned.passages import Passage
from pipelines.features.sources.draw import Draw, draw_splits
from pipelines.features.sources.folder_tables import inside, refuse_outside_folders
from pipelines.features.sources.splits import describe, path_splits
from pipelines.features.sources.stamps import stamp_all
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.speech.audio_files import find_audio
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.pieces import Piece, piece_name
from pipelines.speech.text import same_speakers
from pipelines.whisper import model as whisper_model
from pipelines.whisper import tokens
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

_LANGUAGE = re.compile(r"\.[a-z]{2,3}([-_][a-z]{2})?", re.IGNORECASE)


def _resolve(name: str, setting: str) -> ModelRef:
    return whisper_model.resolve(name)


@dataclass(frozen=True)
class AlignedSource:
    """The corpus in the folder `path`, aligned by the model `aligner`. Folders name the splits, else `seed` draws."""

    path: str
    aligner: str = "openai/whisper-tiny"
    min_logprob: float = -9.0
    language: str = "sv"
    seed: int = 7
    adapt_steps: int = 40
    """Steps for which an untuned aligner is tuned on these recordings; 0: none."""
    processes: int = 1
    """Recordings that are aligned at the same time; the result is the same."""
    find_model: Callable[[str, str], ModelRef] = field(default=_resolve, compare=False)
    """Maps the name of a model and the setting that names it to the model."""

    def identity(self) -> dict[str, str]:
        """Return digests of recordings and texts, the weights of the aligner and the settings; nothing is decoded."""
        files = sorted(path for pair in self._pairs for path in pair)
        files_by, digest = stamp_all(self._folder, files)
        model, adapts = whisper_model.identity(self._model), self._adapts
        return {
            "kind": "aligned",
            "seed": str(self.seed),
            "files_by": files_by,
            "files_sha256": digest,
            "code.aligned": aligners.CODE_VERSION,
            "code.hypotheses": hypotheses.CODE_VERSION,
            "min_logprob": str(self.min_logprob),
            **({"detector": cutter} if (cutter := detection.substitute()) else {}),
            **({"adapt_steps": str(self.adapt_steps), "code.adaptation": adaptation.CODE_VERSION} if adapts else {}),
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
    def _model(self) -> ModelRef:
        return self.find_model(self.aligner, "source.aligner")

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        return find_pairs(self._folder)

    @cached_property
    def _corpus(self) -> tuple[list[Example], frozenset[str]]:
        pieces = self._with_paths(self._passages)
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

    @cached_property
    def _passages(self) -> list[list[Passage]]:
        """The passages of each recording, by the aligner or, if it is untuned, by what it becomes (adaptation.py)."""
        for _, text in self._pairs:
            texts.read(text, logger.info)  # a malformed text is an error now, not after hours of decoding
        detects = not adaptation.is_tuned(self._model) and not tokens.only_language(self._model.folder)
        aligner = Aligner(self._model, self.language, self.min_logprob, detects_language=detects)
        if not self._adapts:
            return self._aligned("aligning", aligner)
        all_scored = self._aligned("aligning", replace(aligner, min_logprob=-math.inf, detects_language=False))
        candidates = [one for one in self._with_paths(all_scored) if not one[1].reason]
        judge = adaptation.adapt(self._model, self.language, candidates, self.adapt_steps, aligners.folder())
        return self._aligned("judging", replace(aligner, judge=judge))

    def _with_paths(self, passages: list[list[Passage]]) -> list[tuple[Path, Passage]]:
        return [(audio, one) for (audio, _), of_audio in zip(self._pairs, passages, strict=True) for one in of_audio]

    @property
    def _adapts(self) -> bool:
        return self.adapt_steps > 0 and not adaptation.is_tuned(self._model)

    def _aligned(self, what: str, aligner: Aligner) -> list[list[Passage]]:
        """Return the passages of each recording; with several processes each aligns one at a time."""
        n = min(self.processes, len(self._pairs))

        def finish(passages: list[Passage]) -> list[Passage]:
            advance()
            return passages

        with progress.show(what, [audio for audio, _ in self._pairs], aligner.journal) as advance:
            if n < 2:
                return [finish(aligner(pair)) for pair in self._pairs]
            with ThreadPoolExecutor(n) as threads, process_pool.Pool(n, aligner) as pool:
                return [*threads.map(lambda pair: finish(pool.run(pair, pair[0].name)), self._pairs)]


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
        name, sound = f"{piece_name(stem, passage.start_s, passage.end_s)}#{n}", NoAudio(passage.reason, detail)
        return Example(name, split, passage.text or passage.reason, sound, speaker)
    meta = {"score": f"{passage.logprob:.3f}", "start_s": f"{passage.start_s:.2f}"}
    name, piece = piece_name(stem, passage.start_s, passage.end_s), Piece(passage.start_s, passage.end_s)
    return PartExample(name, split, passage.text, audio, speaker, meta, piece)
