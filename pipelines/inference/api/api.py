"""The addresses: OpenAI's transcriptions and models, /predict, /health, and what tells about them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, BinaryIO

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi import Path as FromPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import AfterValidator
from starlette.exceptions import HTTPException

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference import subtitles
from pipelines.inference.api import docs_page
from pipelines.inference.api.middleware import OPEN, Gate
from pipelines.inference.api.queue import Desk, Limits
from pipelines.inference.api.schemas import (
    Failure,
    Health,
    Model,
    Models,
    Prediction,
    Refusal,
    Transcription,
    VerboseTranscription,
    verbose,
)
from pipelines.inference.transcriber import Transcriber, Transcript

ALIAS = "whisper-1"
"""OpenAI's own name of Whisper, which many clients send without asking."""
TRANSCRIPTIONS, PREDICT = "/v1/audio/transcriptions", "/predict"
_GRANULARITIES = "timestamp_granularities[]"
_SPOOL_BYTES = 1 << 20
"""A larger body goes from memory to a nameless file."""

_DESCRIPTION = f"""Speech to text by a Whisper model that was tuned for one language.

`POST {TRANSCRIPTIONS}` takes what OpenAI's clients send: give them this server's address with `/v1` as their base URL.
One recording is decoded at a time; others wait for their turn, and where too many wait, the answer is 503 with the
header Retry-After. Recordings are gone with their request; nothing of them is kept or logged."""


class Format(StrEnum):
    """How a transcript is written."""

    json = "json"
    text = "text"
    srt = "srt"
    verbose_json = "verbose_json"
    vtt = "vtt"


class Granularity(StrEnum):
    """What is told when it was said."""

    segment = "segment"
    word = "word"


def _whole(stream: bool) -> bool:
    if stream:
        raise ValueError("this server sends whole transcripts only: leave stream out")
    return stream


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "Not audio, or a field that is wrong"},
    401: {"model": Failure, "description": "The token is missing or wrong"},
    408: {"model": Failure, "description": "The request came too slowly"},
    413: {"model": Failure, "description": "Too many bytes, or too long a recording"},
    503: {
        "model": Failure,
        "description": "Too many are waiting: try again later",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    504: {"model": Failure, "description": "Not done in time"},
}
_OTHER_MODEL = {"model": Failure, "description": "Another model than the one that is served"}
_TEXT = {"schema": {"type": "string"}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
    }
}
_AUDIO_TYPES = ("application/octet-stream", "audio/wav", "audio/flac", "audio/mpeg", "audio/ogg")


def make_app(transcriber: Transcriber, limits: Limits | None = None, token: str = "") -> FastAPI:
    """The API around `transcriber`. With a `token`, all but /health, /openapi.json and /docs want it as bearer."""
    desk = Desk(transcriber, limits or Limits())

    @contextlib.asynccontextmanager
    async def open_until_the_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    api = FastAPI(
        title="Swedish Whisper lab",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's own pages fetch their scripts from another server
        redoc_url=None,
        redirect_slashes=False,
        lifespan=open_until_the_end,
    )
    _add_transcriptions(api, desk)
    _add_predict(api, desk)
    _add_facts(api, desk)
    api.add_middleware(Gate, desk=desk, token=token, heavy={TRANSCRIPTIONS, PREDICT})
    api.add_exception_handler(HTTPException, _refuse)
    api.add_exception_handler(RequestValidationError, _refuse_fields)
    api.add_exception_handler(Exception, _refuse_all)
    _describe(api, token)
    return api


def _add_transcriptions(api: FastAPI, desk: Desk) -> None:
    hears, names = desk.transcriber.language, {ALIAS, name_of(desk.transcriber)}

    @api.post(
        TRANSCRIPTIONS,
        response_model=Transcription | VerboseTranscription,
        responses={
            200: {
                "description": "The transcript, in the format that was asked for",
                "content": {"text/plain": _TEXT, "text/vtt": _TEXT, "application/x-subrip": _TEXT},
            },
            404: _OTHER_MODEL,
            **_ERRORS,
        },
        summary="Transcribe a recording (OpenAI's API)",
    )
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="The recording. Its name is not looked at.")],
        model: Annotated[str, Form(description=f"The name that /v1/models tells, or {ALIAS}.")] = ALIAS,
        language: Annotated[
            str, Form(description="The one that this model hears: /health tells it; leave it out, or say so.")
        ] = "",
        prompt: Annotated[str, Form(description="Accepted, and not used: the models here are tuned without.")] = "",
        response_format: Annotated[Format, Form(description="How the transcript is written.")] = Format.json,
        temperature: Annotated[
            float, Form(ge=0, le=1, description="Accepted, and not used: the likeliest words are taken.")
        ] = 0.0,
        timestamp_granularities: Annotated[
            list[Granularity],
            Form(
                alias=_GRANULARITIES,
                description="`segment`; for `verbose_json` also `word`, where the engine can tell it.",
            ),
        ] = [Granularity.segment],  # noqa: B006  FastAPI copies it
        stream: Annotated[
            bool, AfterValidator(_whole), Form(description="Only false: transcripts come whole.")
        ] = False,
    ) -> Response:
        if model not in names:
            raise _other_model()
        if language.lower() not in ("", hears):
            raise Refusal(400, f"this server hears {hears} only: leave language out", param="language")
        word_times = Granularity.word in timestamp_granularities
        if word_times:
            _refuse_word_times(desk.transcriber, response_format)
        heard = await desk.transcribe(file.file, request.receive, word_times)
        return _written(heard, response_format, hears, word_times)


def _add_predict(api: FastAPI, desk: Desk) -> None:
    body = {"required": True, "content": {**dict.fromkeys(_AUDIO_TYPES, _BINARY), "multipart/form-data": _FORM}}

    @api.post(
        PREDICT,
        response_model=Prediction,
        responses=_ERRORS,
        summary="Transcribe a recording",
        description="The body is the audio file itself, or a form with one `file`.",
        openapi_extra={"requestBody": body},
    )
    async def predict(request: Request) -> Prediction:
        async with _uploaded(request) as upload:
            heard = await desk.transcribe(upload, request.receive)
        return Prediction(
            text=heard.text,
            confidence=round(heard.confidence, 4),
            duration_s=round(heard.audio_s, 3),
            elapsed_s=round(heard.elapsed_s, 3),
        )


def _add_facts(api: FastAPI, desk: Desk) -> None:
    denied = {401: _ERRORS[401]}

    @api.get("/v1/models", response_model=Models, responses=denied, summary="The model that is served (OpenAI's API)")
    async def models() -> Models:
        return Models(data=[_model(desk.transcriber)])

    @api.get(
        "/v1/models/{model:path}",  # names of the Hub hold a slash
        response_model=Model,
        responses={404: _OTHER_MODEL, **denied},
        summary="The model of this name (OpenAI's API)",
    )
    async def one_model(model: Annotated[str, FromPath(description=f"Its name, or {ALIAS}.")]) -> Model:
        if model not in (ALIAS, name_of(desk.transcriber)):
            raise _other_model()
        return _model(desk.transcriber)

    @api.get("/health", response_model=Health, summary="Whether the server answers, and what it serves")
    async def health() -> Health:
        return Health(
            model=told_of(desk.transcriber),
            scores=_scores(desk.transcriber.ref.facts.get("test")),
            waiting=desk.taken,
            places=desk.places,
        )

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page.html_of(api.openapi()), headers={"Content-Security-Policy": docs_page.POLICY})


def name_of(transcriber: Transcriber) -> str:
    """What the API calls the model: never a path."""
    return inference_pipeline.model_info(transcriber.ref)["name"]


def _model(transcriber: Transcriber) -> Model:
    made = transcriber.ref.facts.get("made")
    created = int(datetime.fromisoformat(made).timestamp()) if made else 0
    return Model(id=name_of(transcriber), created=created, owned_by="swedish-whisper-lab")


def _other_model() -> Refusal:
    return Refusal(404, "this model is not served here: GET /v1/models", "model_not_found", param="model")


def _refuse_word_times(transcriber: Transcriber, response_format: Format) -> None:
    if response_format is not Format.verbose_json:
        raise Refusal(400, "times of words are told in verbose_json alone", param=_GRANULARITIES)
    if not transcriber.times_words:
        raise Refusal(400, "this server's engine cannot time words: leave word out", param=_GRANULARITIES)


def told_of(transcriber: Transcriber) -> dict[str, str]:
    """The model's card, the engine that runs it, its language, and when it was made where its manifest tells."""
    known = {name: value for name, value in inference_pipeline.model_info(transcriber.ref).items() if name != "test"}
    made = transcriber.ref.facts.get("made")
    return {**known, "engine": transcriber.loaded.name, "language": transcriber.language} | (
        {"made": made} if made else {}
    )


def _scores(told: dict[str, Any] | None) -> dict[str, Any]:
    """Figures alone: no word of a manifest goes out unseen."""
    return {
        name: value
        for name, value in (told or {}).items()
        if isinstance(value, int | float)
        or (isinstance(value, list) and all(isinstance(one, int | float) for one in value))
    }


def _written(transcript: Transcript, response_format: Format, language: str, word_times: bool) -> Response:
    if response_format is Format.srt:
        return Response(subtitles.srt(transcript), media_type="application/x-subrip")
    if response_format is Format.vtt:
        return Response(subtitles.vtt(transcript), media_type="text/vtt")
    if response_format is Format.text:
        return Response(f"{transcript.text}\n", media_type="text/plain")
    if response_format is Format.verbose_json:
        return JSONResponse(verbose(transcript, language, word_times))
    return JSONResponse({"text": transcript.text})


@contextlib.asynccontextmanager
async def _uploaded(request: Request) -> AsyncIterator[BinaryIO]:
    """The recording in the body of a request, whole, as a file that has no name."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=10) as form:
            file = form.get("file")
            if not hasattr(file, "file"):
                raise Refusal(400, "file: the form has no file of this name", param="file")
            yield file.file
        return
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as file:
        async for chunk in request.stream():
            file.write(chunk)
        yield file


async def _refuse(request: Request, error: HTTPException) -> Response:
    if isinstance(error, Refusal):
        return error.response()
    headers = dict(error.headers or {})
    return Refusal(error.status_code, str(error.detail), headers=headers).response()


async def _refuse_fields(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = next((str(part) for part in first["loc"][1:]), None)
    message = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param}: {message}" if param else message, param=param).response()


async def _refuse_all(request: Request, error: Exception) -> Response:
    """What nobody foresaw: its traceback is in the server's log, and not in the answer."""
    return Refusal(500, "something went wrong on the server; its log tells what").response()


def _describe(api: FastAPI, token: str) -> None:
    """The schema as the API is: errors are 400 and not FastAPI's 422, and where there is a token, it says so."""
    schema = api.openapi()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if token and path not in OPEN:
                operation["security"] = [{"token": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if token:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
