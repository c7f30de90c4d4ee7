"""A folder of recordings without transcripts as a corpus of training clips with pseudo-labels.

    radio/monday.mp3    a recording of any length; subfolders are searched too

A recording that fits into one window is a clip as a whole. A longer one is cut at pauses. What the models wrote is
stored in the lab's cache folder for each recording and model: nothing is decoded twice, also with other limits. A
window whose label is rejected is an example without audio, which becomes a row of `rejected.csv`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipelines.features.sources import SPLITS, Example, NoAudio, PartExample, lines_sha256
from pipelines.features.sources.folder_tables import refuse_outside_folders
from pipelines.features.sources.splits import name_split
from pipelines.features.sources.stamps import stamp_all
from pipelines.features.sources.unlabelled import labeller, labels
from pipelines.features.sources.unlabelled.labeller import Labeller
from pipelines.features.sources.unlabelled.labels import Label, Limits
from pipelines.infra import console, environment, progress_file
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError, fingerprint
from pipelines.speech.audio_files import find_audio
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.pieces import Piece, piece_name
from pipelines.whisper import lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.engines.window_length import usual_window_s
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

CODE_VERSION = "1"
"""Raised when the same texts would give other clips."""
BEAM_SEARCH = "beams"
"""Value of `agreement_model`: the second text is that of the same model with beam search."""
_MAX_MISSING_S = 0.01
"""A window that lacks less of a recording at each end is all of it."""
_LONG_S = 60.0
"""Longer recordings show how far they are decoded."""


def _resolve(name: str, setting: str) -> ModelRef:
    return whisper_model.resolve(name)


@dataclass(frozen=True)
class UnlabelledSource:
    """The training clips in the folder `path`; the arguments are the settings of the same names."""

    path: str
    label_model: str
    min_confidence: float = 0.7
    agreement_model: str = ""
    max_disagreement: float = 0.1
    language_model: str = ""
    exclude: str = ""
    language: str = "sv"
    find_model: Callable[[str, str], ModelRef] = field(default=_resolve, compare=False)
    """Maps the name of a model and the setting that names it to the model."""

    def identity(self) -> dict[str, str]:
        """Return digests of the recordings, the weights of the models and the limits; nothing is decoded."""
        files_by, digest = stamp_all(self._folder, self._recordings)
        fields = {
            "kind": "unlabelled",
            "files_by": files_by,
            "files_sha256": digest,
            "code.unlabelled": CODE_VERSION,
            "code.labeller": labeller.CODE_VERSION,
            "min_confidence": str(self.min_confidence),
            "calibration": str(self._calibration.as_dict()),
            **_weights("label_model", self._labeller.ref),
        }
        if cutter := detection.substitute():
            fields["detector"] = cutter
        if self._second:
            fields |= {"agreement": self._second.mode, "max_disagreement": str(self.max_disagreement)}
            fields |= _weights("agreement_model", self._second.ref)
        if self._detector:
            fields |= _weights("language_model", self._detector.ref)
        if self.exclude:
            fields["excluded_sha256"] = lines_sha256(sorted(name.hex() for name in self._excluded))
        return fields

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the clips and the rejected windows, recording by recording; there are training rows only."""
        return iter(self._corpus) if "train" in splits else iter(())

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is read on access."""
        return self.examples()

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _recordings(self) -> list[Path]:
        return find_recordings(self._folder)

    @cached_property
    def _labeller(self) -> Labeller:
        ref = self.find_model(self.label_model, "source.label_model")
        return Labeller(ref, self.language, usual_window_s(ref))

    @cached_property
    def _second(self) -> Labeller | None:
        """The labeller that the first one is compared with; it decodes the same windows."""
        first = self._labeller
        if self.agreement_model in ("", BEAM_SEARCH):
            mode = labeller.BEAM_SEARCH
            return Labeller(first.ref, self.language, first.window_s, mode) if self.agreement_model else None
        ref = self.find_model(self.agreement_model, "source.agreement_model")
        if whisper_model.identity(ref) == whisper_model.identity(first.ref):
            raise LabError(
                f"source.agreement_model must be another model than source.label_model, got {ref.title} for both: name "
                f"another, or take {BEAM_SEARCH!r} for the same model with beam search"
            )
        return Labeller(ref, self.language, first.window_s)

    @cached_property
    def _detector(self) -> Labeller | None:
        if not self.language_model:
            return None
        ref = self.find_model(self.language_model, "source.language_model")
        labeller.require_languages(ref)
        return Labeller(ref, self.language, self._labeller.window_s, labeller.LANGUAGE)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration.of(self._labeller.ref.facts)

    @cached_property
    def _excluded(self) -> frozenset[bytes]:
        return excluded(self.exclude)

    @cached_property
    def _corpus(self) -> list[Example]:
        if not self._calibration.words:
            logger.info(
                f"note: {self._labeller.ref.title} has no calibrated confidence: words count as right with the "
                "probability that the model gives them, which is often too high"
            )
        examples = []
        with _progress(self._recordings) as report:
            for path in self._recordings:
                examples += self._of_recording(path, report)
        n_used = sum(bool(one.meta) for one in examples)
        logger.info(f"{self.path}: {n_used:,} of {len(examples):,} clips have a pseudo-label that is used")
        return examples

    def _of_recording(self, path: Path, report: Report) -> list[Example]:
        name, folder = path.relative_to(self._folder).as_posix(), environment.cache_folder() / "pseudo_labels"
        if self.exclude and fingerprint(path) in self._excluded:
            report(path, None)
            return [_rejected(name, "excluded", "source.exclude holds a recording with the same content")]
        labellers = (self._labeller, self._second, self._detector)
        passes: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
        try:
            for one in labellers:
                passes.append(one.decode(path, folder, partial(report, path)) if one else ([], {}))
        except AudioError as error:
            return [_rejected(name, error.reason, error.detail)]
        finally:
            report(path, None)
        (windows, facts), (others, _), (detected, _) = passes
        if not windows:
            return [_rejected(name, "no_speech", "no speech is detected in it")]
        texts = {one["start_s"]: one for one in others}
        languages = {one["start_s"]: one["language"] for one in detected}
        limits = Limits(self.min_confidence, self.max_disagreement, self.language)
        examples = []
        for window in windows:
            other, language = texts.get(window["start_s"]), languages.get(window["start_s"], "")
            label = labels.label(window, self._calibration, limits, facts["gaps"], other=other, language=language)
            examples.append(self._example(name, path, label, facts["duration_s"]))
        return examples

    def _example(self, name: str, path: Path, one: Label, duration_s: float) -> Example:
        is_whole = one.start_s < _MAX_MISSING_S and one.end_s > duration_s - _MAX_MISSING_S
        full_name = name if is_whole else piece_name(name, one.start_s, one.end_s)
        if one.reason:
            return _rejected(full_name, one.reason, f"{one.start_s:.1f} to {one.end_s:.1f} s: {one.detail}")
        meta = {
            "label": "pseudo",
            "label_model": lineage.base_of(self._labeller.ref),
            "confidence": f"{one.confidence:.3f}",
            "recording": fingerprint(path).hex(),
        }
        if is_whole:
            return Example(full_name, "train", one.text, path, "", meta)
        piece = Piece(one.start_s, one.end_s)
        return PartExample(full_name, "train", one.text, path, "", {**meta, "start_s": f"{one.start_s:.2f}"}, piece)


def find_recordings(folder: Path) -> list[Path]:
    """Return the recordings of a folder, sorted; other files are logged.

    Raises LabError if there are none, if some are held out, or if a link leads to a folder outside.
    """
    if folder.is_dir():
        refuse_outside_folders(folder)
    audio_files = find_audio(folder)
    recordings = audio_files.files
    if not recordings:
        raise LabError(f"source.path must name a folder of recordings, got {str(folder)!r}, which has none: correct it")
    for path in recordings:
        for part in path.relative_to(folder).parent.parts:
            if name_split(part) in ("validation", "test"):
                raise LabError(
                    f"unlabelled recordings are for training only, got {path.relative_to(folder)} in a folder of "
                    f"{name_split(part)}: name the folder of the training recordings, or rename {part}"
                )
    if skipped := audio_files.describe_skipped():
        logger.info(f"note: {folder} holds {len(recordings)} recordings; skipped: {skipped}")
    return recordings


def excluded(path: str) -> frozenset[bytes]:
    """Return the fingerprints of a recording, or of all recordings in a folder. Raises LabError if there is none."""
    if not path:
        return frozenset()
    location = Path(path).expanduser()
    recordings = find_audio(location).files if location.is_dir() else [location] if location.is_file() else []
    if not recordings:
        raise LabError(f"source.exclude must name a recording or a folder of recordings, got {path!r}: correct it")
    return frozenset(map(fingerprint, recordings))


def _rejected(name: str, reason: str, detail: str) -> Example:
    return Example(name, "train", reason, NoAudio(reason, detail))


def _weights(name: str, ref: ModelRef) -> dict[str, str]:
    fields = {f"{name}.{field}": str(value) for field, value in whisper_model.identity(ref).items()}
    return {**fields, f"{name}.context": ref.context}


Report = Callable[[Path, "float | None"], None]
"""Receives a recording and the seconds of it that were decoded now; None when it is finished."""


@contextlib.contextmanager
def _progress(recordings: Sequence[Path]) -> Iterator[Report]:
    """Yield a function that shows how many recordings are finished and the time left, by their bytes."""
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in recordings}
    started, written_at, left = time.monotonic(), float("-inf"), sum(sizes.values())
    n_done, n_decoded = 0, 0
    decoded: set[Path] = set()

    def report(path: Path, at_s: float | None) -> None:
        nonlocal written_at, left, n_done, n_decoded
        if at_s is not None:
            decoded.add(path)
        else:
            left, n_done = left - sizes[path], n_done + 1
            n_decoded += sizes[path] if path in decoded else 0
            bar.update()
        now = time.monotonic()
        if decoded and (now - written_at >= progress_file.INTERVAL_S or not left):
            written_at = now
            rest = f", {_clock((now - started) * left / n_decoded)} left" if n_decoded else ""
            within = f", {_clock(at_s)} of this one" if at_s is not None and at_s > _LONG_S else ""
            progress_file.append(f"pseudo-labels: {n_done}/{len(sizes)} recordings{within}{rest}")

    with console.progress_bar(desc="pseudo-labels", total=len(sizes), unit="recording") as bar:
        yield report


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
