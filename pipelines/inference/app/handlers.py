"""What the page's buttons do: each answers what its components are to show. Gradio is imported when one is pressed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.app import html
from pipelines.inference.app.i18n import WORDS
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.app.service import Service, SessionTranscript


if TYPE_CHECKING:
    from pipelines.served import Service, SessionTranscript

    Noted = tuple[str, SessionTranscript | None]

DOWNLOADS = ("txt", "srt", "vtt")
"""Endings of the files that the page offers: subtitles.FORMATS."""
EXAMPLES = {
    "boat.ogg": "Båten går klockan sju.",
    "bread.ogg": "Hon köper bröd och ost på torget.",
    "snow.ogg": "I morgon ska det snöa i hela Norrland.",
}
"""Recordings for those who have nothing to say, in the folder beside this file: eSpeak NG's voices, 16 kHz."""

_LOG = logging.getLogger("app")


def example(name: str) -> str:
    """The path of an example."""
    return str(Path(__file__).parent / "examples" / name)


class Buttons:
    """What the buttons do. Whatever goes wrong reaches the page as one line; the details go to the server's log."""

    def __init__(self, service: Service):
        from pipelines.inference.app.live import Talks

        self.service, self.talks = service, Talks(service)

    def begin(self, recording: dict[str, Any] | None) -> tuple[Any, ...]:
        """Another recording, or none: the Transcribe button, and a page without what was said of the last one."""
        import gradio as gr

        return gr.Button(interactive=recording is not None), *self._nothing()

    def _nothing(self) -> tuple[Any, ...]:
        return "", "", None, "", "", "", *self.details(None, "en")

    def details(self, heard: SessionTranscript | None, language: str) -> tuple[Any, ...]:
        """Segments with times and unsure words as HTML, the files to download, buttons for both and to compare."""
        import gradio as gr

        from pipelines.inference import subtitles
        from pipelines.inference.transcriber import Transcript

        said = bool(heard and heard.segments)
        files = None
        if said:
            transcript = Transcript(heard.text, heard.audio_s, heard.elapsed_s, heard.segments)
            files = {ending: subtitles.FORMATS[ending](transcript) for ending in DOWNLOADS}
        told = html.details(heard.segments if said else (), WORDS[language])
        comparable = bool(heard and heard.recording) and self.service.can_compare
        saves = [gr.Button(interactive=said) for _ in DOWNLOADS]
        return told, files, *saves, gr.Button(interactive=comparable)

    def transcribe(
        self, recording: str | None, heard: SessionTranscript | None, language: str, on_progress: Any = None
    ) -> tuple[str, str, SessionTranscript]:
        """Transcript, a line with durations, and what the session remembers. The uploaded file is deleted, unless the
        model was busy: then it can be asked for again."""
        from pipelines.speech.audio import AudioError

        with _one_line(language):
            done = True
            try:
                heard = self.service.transcribe(recording, heard, on_progress or (lambda share: None))
            except AudioError as error:
                done = error.reason != "busy"
                raise
            finally:
                if done:
                    _discard(recording)
            return heard.text, _took(heard, language), heard

    def open(self, opened: bool, language: str) -> tuple[Any, ...]:
        """The microphone is open, or the browser would not: a page without text."""
        import gradio as gr

        if not opened:
            gr.Warning(WORDS[language]["no_microphone"], title=WORDS[language]["sorry"])
        return self._nothing()

    def collect(self, talk: str | None, language: str) -> tuple[str, str, SessionTranscript]:
        """The microphone has ended: transcript, line, what the session remembers."""
        with _one_line(language):
            heard = self.talks.collect(str(talk))
            return heard.text, _took(heard, language), heard

    def compare(self, heard: SessionTranscript | None, language: str) -> str:
        """What the model from which this one was tuned hears in the same recording, beside what this one heard."""
        import gradio as gr

        words = WORDS[language]
        with _one_line(language):
            if heard is None or heard.recording is None:
                gr.Warning(words["nothing_to_compare"], title=words["sorry"])
                return ""
            title, transcript = self.service.before_tuning(heard)
            tuned = (inference_pipeline.model_title(self.service.transcriber.ref), heard.text)
            return html.side_by_side((title, transcript.text), tuned, words)

    def right(self, heard: SessionTranscript | None, username: str, keep: bool, language: str) -> Noted:
        """A line of thanks, and what the session remembers."""
        return self._note(heard, "right", "", username, keep, language)

    def wrong(
        self, heard: SessionTranscript | None, correction: str, username: str, keep: bool, language: str
    ) -> Noted:
        """The same; `correction` is what was said, or the transcript left as it was."""
        return self._note(heard, "wrong", correction, username, keep, language)

    def _note(
        self, heard: SessionTranscript | None, flag: str, correction: str, username: str, keep: bool, language: str
    ) -> Noted:
        import gradio as gr

        from pipelines.inference import feedback

        words = WORDS[language]
        with _one_line(language, "not_noted"):
            if heard is None:
                gr.Warning(words["nothing_to_judge"], title=words["sorry"])
                return "", None
            if max(map(len, (heard.text, correction or "", username or ""))) > feedback.MAX_CHARS:
                gr.Warning(words["text_too_long"], title=words["sorry"])
                return "", heard
            heard = self.service.note(heard, flag, correction or "", username or "", keep=bool(keep))
            line = "thanks" if not keep else "thanks_kept" if heard.recording else "thanks_too_long"
            return words[line].format(flag=words["flag"][flag]), heard


def _took(heard: SessionTranscript, language: str) -> str:
    line = WORDS[language]["took" if heard.text else "nothing_heard"]
    return line.format(audio_s=heard.audio_s, elapsed_s=heard.elapsed_s)


@contextmanager
def _one_line(language: str, lab_error: str = "failed") -> Iterator[None]:
    """Turn every exception into one line on the page, without a path or a traceback; a LabError into `lab_error`."""
    import gradio as gr

    from pipelines.speech.audio import AudioError

    words = WORDS[language]
    try:
        yield
    except AudioError as error:
        _LOG.info("refused a recording: %s", error)
        message = words["refused"].get(error.reason, words["refused"]["unreadable"])
    except LabError as error:
        _LOG.warning("%s", error)
        message = words[lab_error]
    except Exception:
        _LOG.exception("a request failed")
        message = words["failed"]
    else:
        return
    raise gr.Error(message, title=words["sorry"], print_exception=False)


def _discard(upload: str | None) -> None:
    """Delete an upload and its folder; only what lies in Gradio's own folder of uploads."""
    from gradio.utils import get_upload_folder

    if upload is None or not Path(upload).is_relative_to(get_upload_folder()) or _is_example(Path(upload)):
        return
    Path(upload).unlink(missing_ok=True)
    try:
        Path(upload).parent.rmdir()
    except OSError:
        pass  # another upload lies in it


def _is_example(upload: Path) -> bool:
    """Whether this is one of the page's own examples, which another visitor may have chosen, too."""
    return upload.name in EXAMPLES and _same(Path(example(upload.name)), upload)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return False
