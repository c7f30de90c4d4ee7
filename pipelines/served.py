"""What the app serves: which model, and what happens between a recording and a row of feedback. Knows no Gradio."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import manifest

if TYPE_CHECKING:
    from pipelines.audio import Waveform
    from pipelines.models import ModelRef
    from pipelines.transcriber import Segment, Transcriber

BASE_MODEL = "openai/whisper-tiny"
MAX_DURATION_S = 600.0
"""Longer recordings are refused."""
MIN_PEAK = 1e-3
"""Recordings whose largest sample is below this share of full scale are refused as silent."""
HELD_S = 60.0
"""Longer recordings are not held in memory for the listener's consent, and so never kept."""


@dataclass(frozen=True)
class Heard:
    """One transcript, as a visitor's session remembers it."""

    source: str
    """The upload it was made from; the file itself is gone by now."""
    text: str
    audio_s: float
    elapsed_s: float
    """Wall-clock time from file to text."""
    recording: Waveform | None
    """Held in memory until the visitor consents or leaves; None where it is too long to be held."""
    noted: tuple[str, str, bool] | None = None
    """The verdict that was last given on it: flag, correction, recording kept."""
    segments: tuple[Segment, ...] = ()
    """When each part was said, and how sure the model is of each word."""


class Service:
    """A transcriber and a feedback log behind the buttons of a page. Any number of threads may call it."""

    def __init__(self, transcriber: Transcriber, log: Path):
        self.transcriber, self.log = transcriber, log
        self._one_at_a_time = threading.Lock()

    def hear(self, path: str | None, before: Heard | None = None) -> Heard:
        """Transcribe the file `path`; the transcript `before` is the answer where it was made from the same upload.

        Raises audio.AudioError with reason `no_recording`, `missing`, `empty`, `unreadable`, `not_finite`,
        `silent` or `too_long`.
        """
        from pipelines import audio

        if path is None:
            raise audio.AudioError("no_recording", "nothing was recorded or chosen")
        if before is not None and before.source == path:
            return before
        started = time.monotonic()
        waveform = audio.decode(path, MAX_DURATION_S)
        if abs(waveform.samples).max() < MIN_PEAK:
            raise audio.AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
        with self._one_at_a_time:
            transcript = self.transcriber.transcribe(waveform)
        held = waveform if waveform.duration_s <= HELD_S else None
        elapsed_s = time.monotonic() - started
        return Heard(path, transcript.text, waveform.duration_s, elapsed_s, held, segments=transcript.segments)

    def note(self, heard: Heard, flag: str, correction: str = "", username: str = "", *, keep: bool = False) -> Heard:
        """Write the verdict `flag` (right or wrong) on `heard` to the log; the same verdict twice is one row.

        An unchanged transcript is no correction. `keep` is the speaker's consent to store the recording.
        """
        from pipelines import feedback

        correction = "" if flag == "right" or correction.strip() == heard.text.strip() else correction
        verdict = (flag, correction, keep and heard.recording is not None)
        if verdict != heard.noted:
            feedback.append(
                self.log,
                output=heard.text,
                flag=flag,
                model=title(self.transcriber.ref),
                reference=correction,
                username=username,
                recording=heard.recording if keep else None,
            )
        return replace(heard, noted=verdict)


def choose(uri: str | None, runs: Path) -> tuple[str, str]:
    """The URI of the model to serve, and why: `named` (by `uri`), `newest` (finished run below `runs`) or `base`."""
    if uri:
        return uri, "named"
    newest = newest_model(runs)
    return (str(newest), "newest") if newest else (BASE_MODEL, "base")


def newest_model(runs: Path) -> Path | None:
    """The sealed model folder `<runs>/*/train-*/model` that was finished last; unfinished ones do not count."""
    found = [folder for folder in runs.glob("*/train-*/model") if _is_finished_model(folder)]
    return max(found, key=lambda folder: ((folder / manifest.MANIFEST).stat().st_mtime_ns, folder.name), default=None)


def card(ref: ModelRef) -> dict[str, str]:
    """What a visitor may know of the model: name, revision, base, quantisation, test. Never a path of this machine."""
    known = {
        "name": _public(ref.name, ref.folder),
        "revision": ref.revision,
        "base": _public(ref.facts.get("base") or ""),
        "quantisation": ref.quantisation or "",
        "test": _test(ref.facts.get("test")),
    }
    return {name: value for name, value in known.items() if value}


def title(ref: ModelRef) -> str:
    """Name @ revision for the page and the log, without the paths that ModelRef.title may hold."""
    known = card(ref)
    quantised = f" ({ref.quantisation})" if ref.quantisation else ""
    return f"{known['name']}{quantised} @ {ref.revision}"


def _is_finished_model(folder: Path) -> bool:
    return manifest.problem(folder, thorough=False) is None and manifest.read(folder).get("kind") == "model"


def _public(name: str, folder: Path | None = None) -> str:
    """`name`, or for a path what tells it from others: its last part, or the run's name where that part is `model`."""
    if not (name.startswith((".", "/", "~")) or Path(name).is_dir()):
        return name
    folder = folder or Path(name)
    return folder.parent.name if folder.name == "model" else folder.name


def _test(score: dict[str, Any] | None) -> str:
    """`WER 0.254 (95 % 0.221-0.290, n = 160, 12 speakers)`; empty where the model was not scored."""
    if not score:
        return ""
    low, high = score["ci95"]
    return f"WER {score['wer']:.3f} (95 % {low:.3f}–{high:.3f}, n = {score['n']}, {score['speakers']} speakers)"
