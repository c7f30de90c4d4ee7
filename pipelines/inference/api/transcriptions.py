"""The route of OpenAI's transcriptions: its form, its checks, and the response as a whole or as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile
from pydantic import AfterValidator

from pipelines.inference.api.event_stream import EventStream
from pipelines.inference.api.forms import FILE, GRANULARITIES, ChannelForm, SubtitleForm, refuse_other_fields
from pipelines.inference.api.model_names import DEFAULT, ModelNames
from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.api.responses import Format, transcript_response
from pipelines.inference.api.schemas import ERRORS, OTHER_MODEL, Transcription, VerboseTranscription
from pipelines.inference.http.guard import Refusal
from pipelines.inference.subtitles import CUE_FORMATS
from pipelines.inference.transcriber import Transcriber
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

TRANSCRIPTIONS = "/v1/audio/transcriptions"
FIELDS = (
    FILE, "model", "language", "prompt", "response_format", "temperature", GRANULARITIES, "stream", "task",
    "chunking_strategy", "track", "channels", "channel_names", "max_line_width", "max_line_count", "highlight_words",
)  # fmt: skip
"""Fields of a transcription's form."""
STREAMED = (Format.json, Format.text)
"""Formats that can be streamed, as with OpenAI: the events are the same."""
_TEXT = {"schema": {"type": "string"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The transcript, in the requested format; with `stream` as server-sent events",
        "content": {"text/plain": _TEXT, "text/vtt": _TEXT, "application/x-subrip": _TEXT, "text/event-stream": _TEXT},
    },
    404: OTHER_MODEL,
    **ERRORS,
}


class Granularity(StrEnum):
    """Units whose times are returned."""

    segment = "segment"
    word = "word"


def _accept_only(what: str, *accepted: Any) -> AfterValidator:
    """Return a validator that refuses a value that this server would otherwise ignore."""

    def check(value: Any) -> Any:
        if value not in accepted:
            raise ValueError(f"this server {what}: leave it out")
        return value

    return AfterValidator(check)


@dataclass
class RecordingForm:
    """The recording and how it is decoded."""

    file: Annotated[UploadFile, File(description="The recording. Its name is ignored.")]
    model: Annotated[str, Form(description=f"The name in /v1/models, or one that clients send, as {DEFAULT}.")] = (
        DEFAULT
    )
    language: Annotated[str, Form(description="The model's language, as in /health; may be left out.")] = ""
    prompt: Annotated[
        str, AfterValidator(str.strip), _accept_only("takes no prompt", ""), Form(description="Only empty.")
    ] = ""
    response_format: Annotated[Format, Form(description="Format of the transcript.")] = Format.json
    temperature: Annotated[
        float, _accept_only("decodes greedily", 0.0), Form(description="Only 0: decoding is greedy.")
    ] = 0.0
    task: Annotated[
        str, _accept_only("transcribes and does not translate", "transcribe"), Form(description="Only transcribe.")
    ] = "transcribe"
    chunking_strategy: Annotated[
        str, _accept_only("chooses the chunks itself", "auto"), Form(description="Only auto.")
    ] = "auto"
    track: Annotated[int, Form(ge=0, le=99, description="Audio track of a video, from 1; 0: the first.")] = 0


def add_transcriptions(api: FastAPI, queue: TranscriptionQueue, names: ModelNames) -> None:
    """Add the route of transcriptions to `api`."""

    @api.post(
        TRANSCRIPTIONS,
        response_model=Transcription | VerboseTranscription,
        responses=_RESPONSES,
        summary="Transcribe a recording (OpenAI's API)",
    )
    async def transcriptions(
        request: Request,
        form: Annotated[RecordingForm, Depends()],
        channels: Annotated[ChannelForm, Depends()],
        subtitles: Annotated[SubtitleForm, Depends()],
        timestamp_granularities: Annotated[
            list[Granularity],
            Form(
                alias=GRANULARITIES,
                description="`segment`; for `verbose_json` also `word`, if the model supports it.",
            ),
        ] = [Granularity.segment],  # noqa: B006  FastAPI copies it
        stream: Annotated[
            bool, Form(description="Send the text as it is decoded, as server-sent events; for json and text.")
        ] = False,
    ) -> Response:
        await refuse_other_fields(request, FIELDS)
        names.check(form.model)
        check_language(form.language, queue.transcriber)
        word_times = Granularity.word in timestamp_granularities
        if word_times:
            _check_word_times(queue.transcriber, form.response_format)
        times_words, names_of_channels = queue.transcriber.times_words, channels.parse()
        style = subtitles.parse(form.response_format, times_words)
        uses_word_times = word_times or (form.response_format in CUE_FORMATS and times_words)
        options = {"word_times": uses_word_times, "track": form.track, "channel_names": names_of_channels}
        if stream:
            _check_streamed(form.response_format, names_of_channels is not None)
            return await EventStream(queue, form.file.file, request, options).start()
        transcript = await queue.transcribe(form.file.file, request, **options)
        return transcript_response(transcript, form.response_format, queue.transcriber, word_times, style)


def check_language(requested: str, transcriber: Transcriber, param: str = "language") -> None:
    """Raise Refusal (400) unless the language is the served one, in any notation, empty or `auto`."""
    try:
        code = languages.parse_optional(requested)
    except LabError as error:
        raise Refusal(400, str(error), param=param) from None
    if code not in ("", transcriber.language):
        raise Refusal(400, f"this server transcribes {transcriber.language} only: leave language out", param=param)


def _check_word_times(transcriber: Transcriber, response_format: Format) -> None:
    """Raise Refusal (400) if the format has no word times or the model does not support them."""
    if response_format is not Format.verbose_json:
        raise Refusal(400, "word times are available in verbose_json only", param=GRANULARITIES)
    if not transcriber.times_words:
        raise Refusal(400, "this server's model does not support word times: leave word out", param=GRANULARITIES)


def _check_streamed(response_format: Format, is_split: bool) -> None:
    """Raise Refusal (400) for a format that needs the whole transcript, and channels, which are merged at the end."""
    if is_split:
        raise Refusal(400, "split channels cannot be streamed: leave stream out", "unsupported_value", param="stream")
    if response_format not in STREAMED:
        formats = " and ".join(STREAMED)
        raise Refusal(
            400, f"only {formats} can be streamed, not {response_format}: leave stream out", "unsupported_value",
            param="stream",
        )  # fmt: skip
