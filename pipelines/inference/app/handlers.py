"""Handlers of the page's events: each returns the values of its output components. Gradio is imported when called."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.app import html
from pipelines.inference.app.i18n import TEXTS
from pipelines.inference.app.live import LiveSessions
from pipelines.inference.app.middleware import MAX_UPLOAD_BYTES, MAX_UPLOADS_BYTES
from pipelines.inference.app.service import NO_CHOICES
from pipelines.inference.app.uploads import delete_old_uploads, discard_upload, fetch_upload
from pipelines.inference.http.rate_limits import RateLimiter, TooManyRequests
from pipelines.inference.http.remote import DOWNLOAD_S
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import DownloadError
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.app.service import Choices, Service, SessionTranscript
    from pipelines.speech.audio import Gap

    Feedback = tuple[str, SessionTranscript | None]

MAX_GAPS = 5
"""Most places of damage that are listed."""
DOWNLOADS = ("txt", "srt", "vtt")
"""Formats of the files that the page offers, of subtitles.FORMATS."""

logger = logging.getLogger("app")  # outside the lab's loggers: refusals of visitors are not printed


class Handlers:
    """Event handlers of the page. Errors reach the visitor as one line; the details are logged on the server."""

    def __init__(self, service: Service, limiter: RateLimiter | None = None):
        self.service, self.live_sessions = service, LiveSessions(service)
        self.limiter = limiter or RateLimiter(0, 0)
        self.downloads = Limits(MAX_UPLOAD_BYTES / 1e6, DOWNLOAD_S)

    def change_recording(self, recording: dict[str, Any] | None) -> tuple[Any, ...]:
        """Enable the Transcribe button if there is a recording, and clear the results of the previous one."""
        import gradio as gr

        return gr.Button(interactive=recording is not None), *self._cleared()

    def _cleared(self) -> tuple[Any, ...]:
        return "", "", None, "", "", "", *self.show_details(None, "en")

    def show_details(self, transcript: SessionTranscript | None, language: str) -> tuple[Any, ...]:
        """Return the segments as HTML, the files to download, and the states of the buttons to download and compare."""
        import gradio as gr

        from pipelines.inference import subtitles
        from pipelines.inference.transcript import Transcript

        has_segments = bool(transcript and transcript.segments)
        files = None
        if has_segments:
            result = Transcript(transcript.text, transcript.audio_s, transcript.elapsed_s, transcript.segments)
            files = {ending: subtitles.write(result, ending) for ending in DOWNLOADS}
        segments = html.segment_list(
            transcript.segments if has_segments else (), TEXTS[language], self.service.transcriber.language
        )
        is_comparable = bool(transcript and transcript.recording) and self.service.can_compare
        downloads = [gr.Button(interactive=has_segments) for _ in DOWNLOADS]
        return segments, files, *downloads, gr.Button(interactive=is_comparable)

    def transcribe(
        self,
        recording: str | None,
        previous: SessionTranscript | None,
        language: str,
        on_progress: Any = None,
        client: str = "",
        choices: Choices = NO_CHOICES,
    ) -> tuple[str, str, SessionTranscript]:
        """Return the transcript, a line with durations, and the transcript to store in the session.

        The uploaded file is deleted, unless the visitor can try again: the model was busy, the options cannot be used,
        or `client` (the visitor's rate_limits.address_key) is above its limits.
        """
        from pipelines.speech.audio import AudioError

        with errors_as_one_line(language):
            is_new = previous is None or (previous.source, previous.choices) != (recording, choices)
            budget = self.limiter.admit(client) if is_new else None
            can_discard, labels = True, tuple(TEXTS[language]["channels"].values())
            on_progress = on_progress or (lambda share: None)
            try:
                transcript = self.service.transcribe(recording, previous, on_progress, choices, labels)
            except AudioError as error:
                can_discard = error.reason not in ("busy", "options")
                raise
            finally:
                if can_discard:
                    discard_upload(recording)
            if budget:
                budget.charge(transcript.audio_s)
            return transcript.text, _durations(transcript, language), transcript

    def fetch_recording(self, address: str | None, language: str, client: str = "") -> str:
        """Return the path of the recording at an address, downloaded as if the visitor had uploaded it."""
        from gradio.utils import get_upload_folder

        from pipelines.speech.audio import AudioError

        folder = Path(get_upload_folder())
        with errors_as_one_line(language):
            if not (address or "").strip():
                raise AudioError("no_recording", "no address was given")
            self.limiter.admit(client)
            if delete_old_uploads(folder, float("inf")) > MAX_UPLOADS_BYTES:
                raise AudioError("busy", "the uploads fill their space")
            return fetch_upload(address, folder, self.downloads)

    def open_microphone(self, is_open: bool, *options: Any) -> tuple[Any, ...]:
        """Clear the page for a new live transcript; leave it if the microphone was not opened, as the script says."""
        import gradio as gr

        cleared = self._cleared()
        return cleared if is_open else (gr.skip(),) * len(cleared)

    def collect_live(self, session_id: str | None, language: str) -> tuple[str, str, SessionTranscript]:
        """Return the same as `transcribe` for a microphone that was stopped."""
        with errors_as_one_line(language):
            transcript = self.live_sessions.collect(str(session_id))
            return transcript.text, _durations(transcript, language), transcript

    def compare(self, transcript: SessionTranscript | None, language: str, client: str = "") -> str:
        """Return the transcript beside that of the model before fine-tuning; it counts as another request."""
        import gradio as gr

        texts = TEXTS[language]
        with errors_as_one_line(language):
            if transcript is None or transcript.recording is None:
                gr.Warning(texts["nothing_to_compare"], title=texts["sorry"])
                return ""
            self.limiter.admit(client).charge(transcript.audio_s)
            title, before = self.service.transcribe_with_base(transcript)
            tuned = (inference_pipeline.model_title(self.service.transcriber.ref), transcript.plain_text)
            return html.comparison((title, before.text), tuned, texts, self.service.transcriber.language)

    def mark_right(
        self, transcript: SessionTranscript | None, username: str, save_recording: bool, language: str
    ) -> Feedback:
        """Save the feedback that the transcript is right; return a line of thanks and the transcript."""
        return self._add_feedback(transcript, "right", "", username, save_recording, language)

    def mark_wrong(
        self,
        transcript: SessionTranscript | None,
        correction: str,
        username: str,
        save_recording: bool,
        language: str,
    ) -> Feedback:
        """Save the feedback that the transcript is wrong; an unchanged `correction` counts as none."""
        return self._add_feedback(transcript, "wrong", correction, username, save_recording, language)

    def _add_feedback(
        self,
        transcript: SessionTranscript | None,
        flag: str,
        correction: str,
        username: str,
        save_recording: bool,
        language: str,
    ) -> Feedback:
        import gradio as gr

        from pipelines.inference import feedback

        texts = TEXTS[language]
        with errors_as_one_line(language, "not_noted"):
            if transcript is None:
                gr.Warning(texts["nothing_to_judge"], title=texts["sorry"])
                return "", None
            if max(map(len, (transcript.text, correction or "", username or ""))) > feedback.MAX_CHARS:
                gr.Warning(texts["text_too_long"], title=texts["sorry"])
                return "", transcript
            transcript = self.service.add_feedback(
                transcript, flag, correction or "", username or "", save_recording=bool(save_recording)
            )
            key = "thanks" if not save_recording else "thanks_kept" if transcript.recording else "thanks_too_long"
            return texts[key].format(flag=texts["flag"][flag]), transcript


def _durations(transcript: SessionTranscript, language: str) -> str:
    texts = TEXTS[language]
    line = texts["took" if transcript.text else "nothing_heard"]
    line = line.format(audio_s=transcript.audio_s, elapsed_s=transcript.elapsed_s)
    if not transcript.gaps:
        return line
    places = (texts["places"][_kind_of(gap)].format(start_s=gap.start_s, end_s=gap.end_s) for gap in transcript.gaps)
    return f"{line}. **{texts['damaged'].format(places=', '.join(islice(places, MAX_GAPS)))}**"


def _kind_of(gap: Gap) -> str:
    if gap.end_s is None:
        return "after"
    return "at" if gap.end_s - gap.start_s < 0.1 else "between"


@contextmanager
def errors_as_one_line(language: str, lab_error: str = "failed") -> Iterator[None]:
    """Convert every exception to one line without a path or traceback; a LabError to the text `lab_error`."""
    import gradio as gr

    from pipelines.speech.audio import AudioError

    texts = TEXTS[language]
    try:
        yield
    except AudioError as error:
        logger.info("refused a recording: %s", error)
        message = texts["refused"].get(error.reason, texts["refused"]["unreadable"])
    except TooManyRequests as error:
        message = texts["refused"]["too_many"].format(seconds=error.retry_s)
    except DownloadError as error:
        logger.info("%s", error)
        message = texts["refused"]["too_large"] if error.reason == "too_large" else texts["not_fetched"][error.reason]
    except LabError as error:
        logger.warning("%s", error)
        message = texts[lab_error]
    except Exception:
        logger.exception("a request failed")
        message = texts["failed"]
    else:
        return
    raise gr.Error(message, title=texts["sorry"], print_exception=False)
