"""The routes of OpenAI's transcriptions and translations: form, checks, and the response as a whole or as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile

from pipelines.inference.api.event_stream import EventStream
from pipelines.inference.api.forms import (
    FILE,
    GRANULARITIES,
    INCLUDE,
    ChannelForm,
    SubtitleForm,
    is_multipart,
    refuse_other_fields,
)
from pipelines.inference.api.model_names import DEFAULT, ModelNames
from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.api.responses import Format, ResponseStyle, transcript_response
from pipelines.inference.api.schemas import ERRORS, OTHER_MODEL, Transcription, VerboseTranscription
from pipelines.inference.http.guard import Refusal
from pipelines.inference.http.remote import PARAM, fetch_recording
from pipelines.inference.subtitles import CUE_FORMATS
from pipelines.inference.transcriber import Transcriber
from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.recipes.languages import AUTO
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding_options import MAX_BEAMS, parse_hotwords

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
TRANSLATION_FIELDS = (
    FILE, PARAM, "model", "language", "prompt", "response_format", "temperature", "hotwords", "beam_size", "patience",
    "length_penalty", "max_new_tokens", "seed", "track",
)  # fmt: skip
"""Fields of a translation's form: OpenAI's, and those of faster-whisper's servers."""
FIELDS = (
    *TRANSLATION_FIELDS, GRANULARITIES, INCLUDE, "stream", "task", "chunking_strategy", "channels", "channel_names",
    "max_line_width", "max_line_count", "highlight_words",
)  # fmt: skip
"""Fields of a transcription's form."""
MAX_CHARS = 10_000
"""Longest prompt, and longest list of hotwords."""
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


@dataclass
class RecordingForm:
    """The recording and how it is decoded."""

    file: Annotated[UploadFile | None, File(description="The recording. Its name is ignored.")] = None
    url: Annotated[
        str, Form(description="Address of a recording (http, https) in place of `file`, if this server fetches them.")
    ] = ""
    model: Annotated[str, Form(description=f"The name in /v1/models, or one that clients send, as {DEFAULT}.")] = (
        DEFAULT
    )
    language: Annotated[
        str, Form(description="Name or tag. A tuned model has one, as in /health; may be left out.")
    ] = ""
    prompt: Annotated[
        str, Form(max_length=MAX_CHARS, description="Text before the recording, for spelling and style.")
    ] = ""
    response_format: Annotated[Format, Form(description="Format of the transcript.")] = Format.json
    temperature: Annotated[
        float | None,
        Form(ge=0, le=1, description="0, the default, is raised if a text repeats itself; above 0 words are sampled."),
    ] = None
    hotwords: Annotated[
        str, Form(max_length=MAX_CHARS, description="Words that become more probable, separated by commas or lines.")
    ] = ""
    beam_size: Annotated[int | None, Form(ge=1, le=MAX_BEAMS, description="Number of beams; 1 is greedy.")] = None
    patience: Annotated[float | None, Form(ge=0.1, le=10, description="Of beam search.")] = None
    length_penalty: Annotated[float | None, Form(ge=-2, le=4, description="Of beam search.")] = None
    max_new_tokens: Annotated[int | None, Form(ge=1, le=448, description="Longest text of a window, in tokens.")] = None
    seed: Annotated[int | None, Form(ge=0, le=2**32 - 1, description="Of sampling, above temperature 0.")] = None
    track: Annotated[int, Form(ge=0, le=99, description="Audio track of a video, from 1; 0: the first.")] = 0

    async def open(self, request: Request, queue: TranscriptionQueue) -> BinaryIO:
        """Return the recording that was sent, or that at the address. Raises Refusal unless there is one of them."""
        address = self.url.strip()
        if self.file and address:
            raise Refusal(400, "the form has both file and url: send one of them", param=PARAM)
        if address and not is_multipart(request):
            raise Refusal(400, "send the form as multipart/form-data (curl -F)", param=PARAM)
        if address:
            return await fetch_recording(address, queue.limits.downloads, request.receive)
        if not self.file:
            raise Refusal(400, "file: Field required", param=FILE)
        return self.file.file

    def configure(self, transcriber: Transcriber, task: str = "transcribe") -> Transcriber:
        """Return the transcriber of this request. Raises Refusal."""
        return configure(
            transcriber,
            language=self.language,
            task=task,
            prompt=self.prompt.strip() or None,
            hotwords=parse_hotwords(self.hotwords) or None,
            temperatures=(self.temperature,) if self.temperature else None,
            beam_size=self.beam_size,
            patience=self.patience,
            length_penalty=self.length_penalty,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )


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
        include: Annotated[
            list[Literal["logprobs"]],
            Form(alias=INCLUDE, description="`logprobs`: log-probabilities of the words; for json."),
        ] = [],  # noqa: B006
        stream: Annotated[
            bool, Form(description="Send the text as it is decoded, as server-sent events; for json and text.")
        ] = False,
        task: Annotated[Literal["transcribe", "translate"], Form(description="`translate`: to English.")] = (
            "transcribe"
        ),
        chunking_strategy: Annotated[Literal["auto"], Form(description="Only auto.")] = "auto",
    ) -> Response:
        await refuse_other_fields(request, FIELDS)
        names.check(form.model)
        word_times = Granularity.word in timestamp_granularities
        if word_times:
            _check_word_times(queue.transcriber, form.response_format)
        if include and form.response_format is not Format.json:
            raise Refusal(400, "logprobs are available in json only", param=INCLUDE)
        transcriber = form.configure(queue.transcriber, task)
        times_words, names_of_channels = queue.transcriber.times_words, channels.parse()
        style = ResponseStyle(
            form.response_format, word_times, bool(include), subtitles.parse(form.response_format, times_words)
        )
        uses_word_times = word_times or (form.response_format in CUE_FORMATS and times_words)
        options = {"word_times": uses_word_times, "track": form.track, "channel_names": names_of_channels}
        options["transcriber"] = transcriber
        if stream:
            _check_streamed(form.response_format, names_of_channels is not None)
            options["transcriber"] = transcriber.window_by_window()
            return await EventStream(
                queue, await form.open(request, queue), request, options, with_logprobs=bool(include)
            ).start()
        transcript = await queue.transcribe(await form.open(request, queue), request, **options)
        return transcript_response(transcript, style, transcriber)


def add_translations(api: FastAPI, queue: TranscriptionQueue, names: ModelNames) -> None:
    """Add the route of translations to English to `api`."""

    @api.post(
        TRANSLATIONS,
        response_model=Transcription | VerboseTranscription,
        responses=_RESPONSES,
        summary="Translate a recording to English (OpenAI's API)",
        description="For multilingual models that were not fine-tuned.",
    )
    async def translations(request: Request, form: Annotated[RecordingForm, Depends()]) -> Response:
        await refuse_other_fields(request, TRANSLATION_FIELDS)
        names.check(form.model)
        transcriber = form.configure(queue.transcriber, "translate")
        transcript = await queue.transcribe(
            await form.open(request, queue), request, track=form.track, transcriber=transcriber
        )
        return transcript_response(transcript, ResponseStyle(form.response_format), transcriber)


def configure(
    transcriber: Transcriber, *, language: str = "", task: str = "transcribe", prefix: str = "", **options: Any
) -> Transcriber:
    """Return the transcriber with the options of a request; the language may be in any notation, empty or `auto`.

    `prefix` is the path of the fields in errors. Raises Refusal (400), also for a language or task that a tuned model
    has not.
    """
    tuned_for = whisper_model.language_of(transcriber.ref, default="")
    if tuned_for and task == "translate":
        message = f"this server's model was tuned to transcribe {tuned_for} and does not translate"
        raise Refusal(400, message, param="task")
    try:
        code = languages.parse_or_auto(language)
        if tuned_for and code not in ("", AUTO, transcriber.language):
            raise LabError(f"this server transcribes {transcriber.language} only: leave language out")
        configured = transcriber.with_options(language=code or None, task=task, **options)
    except LabError as error:
        raise Refusal(400, str(error), param=f"{prefix}language") from None
    return configured


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
