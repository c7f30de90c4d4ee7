"""Handlers of the recording page's events: they return what the page shows. Gradio is imported when called."""

from __future__ import annotations

import html
import logging
import secrets
import threading
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from pipelines.collection.record.folder import sentence_id
from pipelines.collection.record.i18n import TEXTS
from pipelines.collection.record.recorder import MAX_ACCENT_CHARS, MAX_NICKNAME_CHARS, Recorder, Session, Take
from pipelines.inference.app.handlers import errors_as_one_line
from pipelines.inference.app.uploads import discard_upload
from pipelines.inference.http.rate_limits import RateLimiter
from pipelines.infra.errors import LabError
from pipelines.speech import text

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstv" for vowel in "aeiou")

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """The sentence that a page is at, shared by all states of its visit, since events of one page may overlap."""

    sentence: str | None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Visit:
    """What the server remembers of an open page. A reload begins another visit."""

    session: Session
    nickname: str
    """Held in memory only, and only until the visit expires."""
    position: Position
    upload: str | None = None
    """Path of the upload that the take was read from; deleted when the take is stored or replaced."""


class SameNickname(Exception):
    """The nickname was used before, and the visitor has not said that it is theirs."""


class Handlers:
    """Event handlers. Errors reach the visitor as one line, without a path."""

    def __init__(self, recorder: Recorder, limiter: RateLimiter | None = None):
        self.recorder, self.limiter = recorder, limiter or RateLimiter(0, 0)
        self._starting = threading.Lock()

    def start(
        self, agrees: bool, nickname: str, about: tuple[Any, ...], language: str, client: str = "", confirmed: str = ""
    ) -> Visit | None:
        """Begin a visit; return None, with a message on the page, if the speaker does not agree.

        `about`: gender, age and accent, each empty or None if it is not stated. `confirmed` is the nickname of which
        the visitor has said that it is theirs. Raises SameNickname if another person may have chosen the same.
        """
        import gradio as gr

        nickname, about = text.clean(str(nickname or "")), [str(value or "") for value in about]
        if agrees is not True:
            gr.Warning(TEXTS[language]["must_agree"])
            return None
        if len(nickname) > MAX_NICKNAME_CHARS or len(about[2]) > MAX_ACCENT_CHARS:
            gr.Warning(TEXTS[language]["too_long_name"])
            return None
        with errors_as_one_line(language):
            self.limiter.admit(client)
        with self._starting:
            if not nickname:
                nickname = next(name for name in iter(_new_nickname, None) if not self.recorder.is_known(name))
            elif self.recorder.is_known(nickname) and not self.recorder.is_same(nickname, confirmed):
                raise SameNickname
            session = self.recorder.start(nickname, *about)
        return Visit(session, nickname, Position(session.sentence))

    def check(
        self,
        recording: str | None,
        visit: Visit | None,
        language: str,
        client: str = "",
        sentence: str | None = None,
    ) -> Visit | None:
        """Check what was recorded, or forget the take if `recording` is None; return the visit.

        `sentence` here and below is the id of the sentence that the page showed when it was recorded or a button was
        pressed; None: it is not compared. Returns None if the page went on during the check: nothing changes then.
        """
        if visit is None and recording is not None:
            self._warn(language, "visit_expired")
            discard_upload(recording)
        if visit is None or visit.session.sentence is None:
            return visit
        if recording is not None and self._is_other(visit, sentence, language):
            discard_upload(recording)
            recording = None
        if visit.upload != recording:
            discard_upload(visit.upload)
        if recording is None:
            return replace(visit, session=replace(visit.session, take=None), upload=None)
        with errors_as_one_line(language):
            budget = self.limiter.admit(client)
            session = self.recorder.check(visit.session, recording)
            if session.take.waveform is not None:
                budget.charge(session.take.waveform.duration_s)
        if visit.position.sentence != session.sentence:
            return None
        return replace(visit, session=session, upload=recording)

    def keep(self, visit: Visit | None, language: str, sentence: str | None = None) -> Visit | None:
        """Store the take and go on to the next sentence. If it cannot be stored, the take stays on the page.

        Returns None, here and in `skip`, if an earlier press of a button has gone on already: nothing changes then.
        """
        visit = self._require(visit, language)
        if self._is_other(visit, sentence, language):
            return visit
        with visit.position.lock:
            if visit.position.sentence != visit.session.sentence:
                return None
            try:
                session = self.recorder.store(visit.session)
            except (LabError, OSError) as error:
                logger.warning(f"warning: a take was not stored: {error}")
                self._refuse(language, "not_saved")
            visit.position.sentence = session.sentence
        if session.is_repeated and session is not visit.session:
            self._warn(language, "repeated")
        return self._go_on(visit, session)

    def skip(self, visit: Visit | None, language: str, sentence: str | None = None) -> Visit | None:
        """Go on to another sentence without a take."""
        visit = self._require(visit, language)
        if not visit.session.sentence or self._is_other(visit, sentence, language):
            return visit
        with visit.position.lock:
            if visit.position.sentence != visit.session.sentence:
                return None
            session = self.recorder.skip(visit.session)
            visit.position.sentence = session.sentence
        return self._go_on(visit, session)

    def _is_other(self, visit: Visit, sentence: str | None, language: str) -> bool:
        """Return whether the page showed another sentence than the visit is at; a message says that nothing is done."""
        if sentence is None or sentence == sentence_id(visit.session.sentence or ""):
            return False
        self._warn(language, "other_sentence")
        return True

    def _warn(self, language: str, name: str) -> None:
        import gradio as gr

        gr.Warning(TEXTS[language][name], title=TEXTS[language]["sorry"])

    def _go_on(self, visit: Visit, session: Session) -> Visit:
        """Return the visit at its next sentence, without the upload; the same visit if nothing has changed."""
        if session is visit.session:
            return visit
        discard_upload(visit.upload)
        return replace(visit, session=session, upload=None)

    def _require(self, visit: Visit | None, language: str) -> Visit:
        return visit if visit is not None else self._refuse(language, "visit_expired")

    def _refuse(self, language: str, name: str) -> NoReturn:
        import gradio as gr

        raise gr.Error(TEXTS[language][name], title=TEXTS[language]["sorry"], print_exception=False)

    def show(self, visit: Visit | None, language: str) -> tuple[Any, ...]:
        """Return the values of page.View.outputs: what the page shows of a visit."""
        import gradio as gr

        if visit is None:
            return gr.update(visible=True), gr.update(visible=False), "", "", "", *[gr.update(interactive=False)] * 3
        texts, session = TEXTS[language], visit.session
        fields = {"n_done": session.n_done, "n_all": len(self.recorder.sentences)}
        can_store = session.take is not None and session.take.waveform is not None
        return (
            gr.update(visible=False),
            gr.update(visible=True),
            texts["progress"].format(**fields, nickname=html.escape(visit.nickname)),
            sentence_html(session.sentence, texts),
            status_html(session.take, texts) if session.sentence else "",
            gr.update(interactive=session.take is not None),
            gr.update(interactive=can_store),
            gr.update(interactive=session.sentence is not None),
        )


def _new_nickname() -> str:
    return "".join(secrets.choice(_SYLLABLES) for _ in range(5))


def sentence_html(sentence: str | None, texts: dict[str, Any]) -> str:
    """Return the sentence to read, or thanks if there is none."""
    shown = f"<p data-sentence='{sentence_id(sentence)}'>{html.escape(sentence)}</p>" if sentence else ""
    return shown or f"<p class='done'>{texts['done']}</p>"


def status_html(take: Take | None, texts: dict[str, Any]) -> str:
    """Return what the checks found in a take: one line if it is good, else its problems and what to do."""
    if take is None:
        return f"<p>{texts['hint']}</p>"
    check, heard = take.check, ""
    if check.hypothesis is not None:
        heard = f"<p>{texts['heard']} <q>{html.escape(check.hypothesis) or texts['no_words']}</q></p>"
    if not check.problems:
        return f"<p class='good'>✓ {texts['good']}</p>{heard}"
    items = "".join(f"<li>{texts['problems'][problem]}</li>" for problem in check.problems)
    anyway = f"<p>{texts['keep_anyway']}</p>" if check.can_be_kept else ""
    return f"<p class='bad'>✗ {texts['again_please']}</p><ul>{items}</ul>{heard}{anyway}"
