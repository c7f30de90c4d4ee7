"""Sessions of speakers: the next sentence, the check of a take, and its storage. Does not import Gradio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipelines.collection.record import folder as take_folder
from pipelines.collection.record.checks import MAX_TAKE_S, Check, check_take
from pipelines.speech import audio, text

if TYPE_CHECKING:
    from pipelines.collection.record.folder import TakeFolder
    from pipelines.inference.transcriber import Transcriber
    from pipelines.speech.audio import Waveform

GENDERS = ("female", "male", "other")
AGES = ("under 18", "18-29", "30-39", "40-49", "50-59", "60-69", "70 or over")
MAX_NICKNAME_CHARS, MAX_ACCENT_CHARS = 60, 60
_REASONS = {"too_long": "too_long", "silent": "no_speech", "empty": "no_speech"}
"""Reason of an AudioError to the problem of a take; others are `unreadable`."""


@dataclass(frozen=True)
class Take:
    """A take that was checked and is not stored yet."""

    waveform: Waveform | None
    """None if it cannot be kept."""
    check: Check


@dataclass(frozen=True)
class Session:
    """A speaker who has given consent, as stored in a visitor's session."""

    speaker: str
    details: dict[str, str] = field(default_factory=dict)
    """Cells of the speaker's rows: gender, age, accent, consented_at."""
    sentence: str | None = None
    """The sentence to read; None at the end of the list."""
    take: Take | None = None
    n_done: int = 0
    is_repeated: bool = False
    """Whether the last take was not stored, since the speaker had read the sentence on another page."""
    skipped: frozenset[str] = frozenset()


class Recorder:
    """The sentences, the folder and the model that listens. Its methods are thread-safe."""

    def __init__(self, sentences: Sequence[str], folder: TakeFolder, transcriber: Transcriber | None = None):
        """`transcriber` compares takes with their sentences; None: they are not compared."""
        self.sentences, self.folder, self.transcriber = sentences, folder, transcriber
        self._started: set[str] = set()

    def is_known(self, nickname: str) -> bool:
        """Return whether a speaker with this nickname has takes, or has begun since the server was started."""
        speaker = self.folder.speaker_id(nickname)
        return speaker in self._started or any(row["speaker"] == speaker for row in self.folder.takes())

    def is_same(self, nickname: str, other: str) -> bool:
        """Return whether two nicknames mean the same speaker."""
        return self.folder.speaker_id(nickname) == self.folder.speaker_id(other)

    def start(self, nickname: str, gender: str = "", age: str = "", accent: str = "") -> Session:
        """Return the session of a speaker who gave consent; it goes on after the sentences that are already stored.

        The nickname is not stored. Unknown values of `gender` and `age` count as not stated.
        """
        details = {
            "gender": gender if gender in GENDERS else "",
            "age": age if age in AGES else "",
            "accent": text.clean(accent[:MAX_ACCENT_CHARS].encode("utf-8", "replace").decode()),
            "consented_at": take_folder.now(),
        }
        speaker = self.folder.speaker_id(nickname)
        self._started.add(speaker)
        return self._next(Session(speaker, details))

    def check(self, session: Session, path: str) -> Session:
        """Return the session with the take at `path`, checked."""
        try:
            waveform = audio.decode(path, MAX_TAKE_S)
        except audio.AudioError as error:
            return replace(session, take=Take(None, Check((_REASONS.get(error.reason, "unreadable"),))))
        check = check_take(waveform, session.sentence, self._transcribe if self.transcriber else None)
        return replace(session, take=Take(waveform if check.can_be_kept else None, check))

    def store(self, session: Session) -> Session:
        """Store the session's take and go on to the next sentence. A take that cannot be kept changes nothing.

        Raises LabError or OSError if it cannot be stored; the take stays in the session.
        """
        take = session.take
        if take is None or take.waveform is None:
            return session
        check = take.check
        fields = session.details | {
            "problems": " ".join(check.problems),
            "hypothesis": check.hypothesis or "",
            "difference": "" if check.difference is None else f"{check.difference:.3f}",
            "level_dbfs": f"{check.level_dbfs:.1f}",
            "snr_db": f"{check.snr_db:.1f}",
        }
        is_new = self.folder.add(session.speaker, session.sentence, take.waveform, fields)
        return self._next(replace(session, is_repeated=not is_new))

    def skip(self, session: Session) -> Session:
        """Go on to the next sentence without a take; the speaker may read this one in another session."""
        return self._next(replace(session, skipped=session.skipped | {session.sentence}, is_repeated=False))

    def _next(self, session: Session) -> Session:
        """Return the session at its next sentence: of those that the speaker has not read, one that fewest have read.

        So several speakers divide the list, and few sentences occur in two splits.
        """
        takes = self.folder.takes()
        done = {row["text"] for row in takes if row["speaker"] == session.speaker}
        counts = Counter(row["text"] for row in takes)
        open_ = [sentence for sentence in self.sentences if sentence not in done | session.skipped]
        sentence = min(open_, key=lambda sentence: counts[sentence], default=None)
        n_done = sum(sentence in done for sentence in self.sentences)
        return replace(session, sentence=sentence, take=None, n_done=n_done)

    def _transcribe(self, waveform: Waveform) -> str:
        return self.transcriber.transcribe(waveform).text


def load_model(load: Callable[[], Transcriber], warn: Callable[[str], None]) -> Transcriber | None:
    """Return the model that listens, or None after a warning: recording goes on without it."""
    from pipelines.infra.errors import LabError

    try:
        return load()
    except (LabError, OSError) as error:
        warn(f"takes are not compared with their sentences, since the model cannot be loaded: {error}")
        return None
