"""Handlers of the review page's events: they return what the page shows. Gradio is imported when called."""

from __future__ import annotations

import base64
import difflib
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.collection.review.queue import MIN_DECISIONS, Queue
from pipelines.collection.review.sessions import OutdatedClip, Sessions, Showing
from pipelines.collection.review.texts import TEXTS
from pipelines.features.sources import Example, NoAudio
from pipelines.infra.errors import LabError
from pipelines.speech import audio as speech_audio
from pipelines.speech import text as speech_text

_MAX_S = 30.0
Pressed = Any
"""What the script sends with a key or a click: {"token": of the clip on the page, "heard": whether it was played}."""


class Handlers:
    """What the page's keys and buttons call."""

    def __init__(self, queue: Queue, examples: Mapping[str, Example]):
        """`examples` are the source's examples of the queue's clips by id; their audio is read when it is played."""
        self.queue, self.examples, self.sessions = queue, examples, Sessions(queue)

    def show(self, session: str | None, language: str) -> list[Any]:
        """Return progress, clip and text field for the clip that this session reviews now."""
        import gradio as gr

        texts = TEXTS[language]
        at = self.queue.progress()
        line = texts["progress"].format(reviewed=at.reviewed, clips=at.clips, wrong=at.wrong) + " "
        line += texts["no_share"].format(least=MIN_DECISIONS) if at.share is None else ""
        line += texts["share"].format(share=at.share) if at.share is not None else ""
        showing = self.sessions.show(str(session)) if session else None
        if showing is None:
            left = at.clips - at.reviewed
            end = f"<p id='done'>{texts['left'].format(left=left) if left else texts['done']}</p>" if session else ""
            return [line, end, gr.update(value="", visible=False)]
        earlier = self.queue.decision(showing.item.id)
        text = earlier.after if earlier and earlier.after else showing.item.text
        clip = _clip_html(showing, self.examples.get(showing.item.id), earlier.verdict if earlier else "", texts)
        return [line, clip, gr.update(value=text, visible=True)]

    def decide(
        self, verdict: str, session: str | None, pressed: Pressed, after: str, reviewer: str, language: str
    ) -> list[Any]:
        """Store a decision about the clip that was on the page, and show the next one.

        Nothing is stored, and a message says why, if the clip is not on the page any more, was not played yet, or is
        accepted although its text was changed.
        """
        token, was_played = _read(pressed)
        after = str(after or "")
        try:
            if session:
                item = self.sessions.item_on_page(str(session), token)
                if not was_played:
                    raise LabError(TEXTS[language]["listen_first"])
                if verdict == "accept" and speech_text.clean(after) not in ("", speech_text.clean(item.text)):
                    raise LabError(TEXTS[language]["text_changed"])
                self.sessions.decide(str(session), token, verdict, after, str(reviewer or ""))
        except LabError as error:
            return self._refused(error, session, language)
        return self.show(session, language)

    def skip(self, session: str | None, pressed: Pressed, language: str) -> list[Any]:
        """Show another clip; this one is left to others, or to this reviewer after a reload."""
        try:
            if session:
                self.sessions.skip(str(session), _read(pressed)[0])
        except LabError as error:
            return self._refused(error, session, language)
        return self.show(session, language)

    def back(self, session: str | None, pressed: Pressed, language: str) -> list[Any]:
        """Show the clip that was decided on before, with that decision, which a new one replaces."""
        try:
            if session and not self.sessions.back(str(session), _read(pressed)[0]):
                raise LabError(TEXTS[language]["no_earlier"])
        except LabError as error:
            return self._refused(error, session, language)
        return self.show(session, language)

    def _refused(self, error: LabError, session: str | None, language: str) -> list[Any]:
        """Say why nothing was stored. A page that shows another clip than it should is brought up to date."""
        import gradio as gr

        is_old = isinstance(error, OutdatedClip)
        message = TEXTS[language]["not_shown"] if is_old else html.escape(str(error))
        gr.Warning(message, title=TEXTS[language]["not_stored"])
        return self.show(session, language) if is_old else [gr.skip()] * 3


def _read(pressed: Pressed) -> tuple[str, bool]:
    """Return token and whether the clip was played, of what any browser may send."""
    pressed = pressed if isinstance(pressed, dict) else {}
    return str(pressed.get("token") or ""), pressed.get("heard") is True


def _clip_html(showing: Showing, example: Example | None, verdict: str, texts: Mapping[str, Any]) -> str:
    item = showing.item
    ours, theirs = _marked(item.text, item.heard)
    earlier = f"<p id='earlier'>{texts['earlier'][verdict]}</p>" if verdict else ""
    data = f"data-token='{showing.token}' data-text='{html.escape(item.text)}'"
    return (
        f"{_player(example, texts)}{earlier}<dl id='texts' {data}><dt>{texts['transcript']}</dt>"
        f"<dd id='before'>{ours}</dd><dt>{texts['heard']}</dt><dd id='heard'>{theirs}</dd></dl>"
    )


def _player(example: Example | None, texts: Mapping[str, Any]) -> str:
    try:
        sound = example.audio if example else NoAudio("missing", "")
        wav = "" if isinstance(sound, NoAudio) else base64.b64encode(_wav(sound)).decode()
    except (speech_audio.AudioError, OSError):
        wav = ""
    if not wav:
        return f"<p>{texts['no_audio']}</p>"
    return f"<audio id='review-player' controls autoplay src='data:audio/wav;base64,{wav}'></audio>"


def _marked(ours: str, theirs: str) -> tuple[str, str]:
    """Return two texts as HTML, with marks around the words that differ."""
    pair = (ours.split(), theirs.split())
    keys = [[word.lower().strip(".,!?:;\"'") for word in words] for words in pair]
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, *ends in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((ends[:2], ends[2:])):
            part = html.escape(" ".join(pair[side][start:end]))
            if part:
                marked[side].append(part if kind == "equal" else f"<mark>{part}</mark>")
    return " ".join(marked[0]), " ".join(marked[1])


def _wav(sound: bytes | Path) -> bytes:
    """Return a recording as a WAV file of 16 bits. Raises AudioError."""
    import soundfile

    waveform, out = speech_audio.decode(sound, _MAX_S), io.BytesIO()
    soundfile.write(out, waveform.samples, speech_audio.SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return out.getvalue()
