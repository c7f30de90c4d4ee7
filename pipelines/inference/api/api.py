"""The routes of the API: OpenAI's transcriptions and models, /predict, /health and the documentation."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from enum import StrEnum
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import AfterValidator
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pipelines.inference.api import docs_page
from pipelines.inference.api.forms import FILE, GRANULARITIES, FormRoute, refuse_other_fields
from pipelines.inference.api.middleware import PUBLIC_PATHS, ApiMiddleware
from pipelines.inference.api.queue import Limits, TranscriptionQueue
from pipelines.inference.api.responses import (
    DAMAGE_HEADER,
    Format,
    model_entry,
    model_facts,
    model_name,
    model_scores,
    open_upload,
    prediction,
    transcript_response,
)
from pipelines.inference.api.schemas import (
    Failure,
    Health,
    Model,
    Models,
    Prediction,
    Transcription,
    VerboseTranscription,
)
from pipelines.inference.http.guard import Refusal
from pipelines.inference.transcriber import Transcriber
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

ALIAS = "whisper-1"
"""OpenAI's name for Whisper, which many clients send by default."""
TRANSCRIPTIONS, PREDICT = "/v1/audio/transcriptions", "/predict"
FIELDS = (
    FILE, "model", "language", "prompt", "response_format", "temperature", GRANULARITIES, "stream", "task",
    "chunking_strategy", "track",
)  # fmt: skip
"""Fields of a transcription's form."""

_DESCRIPTION = f"""Speech to text by a Whisper model that was fine-tuned for one language.

`POST {TRANSCRIPTIONS}` is compatible with OpenAI's clients: set their base URL to this server's address with `/v1`.
One recording is decoded at a time and the others wait. If too many are waiting, the response is 503 with the header
Retry-After. Recordings are deleted with their request; they are neither stored nor logged."""


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


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "Not audio, or a wrong field"},
    401: {"model": Failure, "description": "The token is missing or wrong"},
    408: {"model": Failure, "description": "The request arrived too slowly"},
    413: {"model": Failure, "description": "The request is too large or the recording too long"},
    503: {
        "model": Failure,
        "description": "Too many requests are waiting: try again later",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    504: {"model": Failure, "description": "Not done in time"},
}
_OTHER_MODEL = {"model": Failure, "description": "This server does not serve that model"}
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


def make_app(
    transcriber: Transcriber, limits: Limits | None = None, token: str = "", origins: Collection[str] = ()
) -> FastAPI:
    """Create the API around `transcriber`.

    With a `token`, all routes but /health, /openapi.json and /docs require it as a bearer token. Pages of `origins`,
    such as `https://my.page` or `*` for all, may call it from a browser (CORS).
    """
    queue = TranscriptionQueue(transcriber, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    api = FastAPI(
        title="Swedish Whisper lab",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's own pages load scripts from another server
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    api.router.route_class = FormRoute
    _add_transcriptions(api, queue)
    _add_predict(api, queue)
    _add_models(api, transcriber)
    _add_health(api, queue)
    _add_docs(api)
    api.add_middleware(ApiMiddleware, queue=queue, token=token, queued_paths={TRANSCRIPTIONS, PREDICT})
    api.add_middleware(  # added last: it comes first, before the token
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", DAMAGE_HEADER],
    )
    api.add_exception_handler(HTTPException, _handle_http_error)
    api.add_exception_handler(RequestValidationError, _handle_invalid_fields)
    api.add_exception_handler(Exception, _handle_unexpected_error)
    _adapt_schema(api, token)
    return api


def _add_transcriptions(api: FastAPI, queue: TranscriptionQueue) -> None:
    language_served, names = queue.transcriber.language, {ALIAS, model_name(queue.transcriber)}
    responses = {
        200: {
            "description": "The transcript, in the requested format",
            "content": {"text/plain": _TEXT, "text/vtt": _TEXT, "application/x-subrip": _TEXT},
        },
        404: _OTHER_MODEL,
        **_ERRORS,
    }

    @api.post(
        TRANSCRIPTIONS,
        response_model=Transcription | VerboseTranscription,
        responses=responses,
        summary="Transcribe a recording (OpenAI's API)",
    )
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="The recording. Its name is ignored.")],
        model: Annotated[str, Form(description=f"The name in /v1/models, or {ALIAS}.")] = ALIAS,
        language: Annotated[str, Form(description="The model's language, as in /health; may be left out.")] = "",
        prompt: Annotated[
            str, AfterValidator(str.strip), _accept_only("takes no prompt", ""), Form(description="Only empty.")
        ] = "",
        response_format: Annotated[Format, Form(description="Format of the transcript.")] = Format.json,
        temperature: Annotated[
            float, _accept_only("decodes greedily", 0.0), Form(description="Only 0: decoding is greedy.")
        ] = 0.0,
        timestamp_granularities: Annotated[
            list[Granularity],
            Form(
                alias=GRANULARITIES,
                description="`segment`; for `verbose_json` also `word`, if the model supports it.",
            ),
        ] = [Granularity.segment],  # noqa: B006  FastAPI copies it
        stream: Annotated[bool, _accept_only("does not stream", False), Form(description="Only false.")] = False,
        task: Annotated[
            str, _accept_only("transcribes and does not translate", "transcribe"), Form(description="Only transcribe.")
        ] = "transcribe",
        chunking_strategy: Annotated[
            str, _accept_only("chooses the chunks itself", "auto"), Form(description="Only auto.")
        ] = "auto",
        track: Annotated[int, Form(ge=0, le=99, description="Audio track of a video, from 1; 0: the first.")] = 0,
    ) -> Response:
        await refuse_other_fields(request, FIELDS)
        if model not in names:
            raise _unknown_model()
        _check_language(language, language_served)
        word_times = Granularity.word in timestamp_granularities
        if word_times:
            _check_word_times(queue.transcriber, response_format)
        transcript = await queue.transcribe(file.file, request.receive, word_times, track)
        return transcript_response(transcript, response_format, queue.transcriber, word_times)


def _add_predict(api: FastAPI, queue: TranscriptionQueue) -> None:
    body = {"required": True, "content": {**dict.fromkeys(_AUDIO_TYPES, _BINARY), "multipart/form-data": _FORM}}

    @api.post(
        PREDICT,
        response_model=Prediction,
        response_model_exclude_none=True,
        responses=_ERRORS,
        summary="Transcribe a recording",
        description="The body is the audio file itself, or a form with one `file`.",
        openapi_extra={"requestBody": body},
    )
    async def predict(request: Request) -> Prediction:
        async with open_upload(request) as upload:
            await refuse_other_fields(request, (FILE,))
            return prediction(await queue.transcribe(upload, request.receive))


def _add_models(api: FastAPI, transcriber: Transcriber) -> None:
    denied = {401: _ERRORS[401]}

    @api.get("/v1/models", response_model=Models, responses=denied, summary="List the served model (OpenAI's API)")
    async def models() -> Models:
        return Models(data=[model_entry(transcriber)])

    @api.get(
        "/v1/models/{model:path}",  # names of Hub models contain a slash
        response_model=Model,
        responses={404: _OTHER_MODEL, **denied},
        summary="Describe the model of this name (OpenAI's API)",
    )
    async def one_model(model: Annotated[str, PathParameter(description=f"The model's name, or {ALIAS}.")]) -> Model:
        if model not in (ALIAS, model_name(transcriber)):
            raise _unknown_model()
        return model_entry(transcriber)


def _add_health(api: FastAPI, queue: TranscriptionQueue) -> None:
    @api.get("/health", response_model=Health, summary="State of the server and its model")
    async def health() -> Health:
        return Health(
            model=model_facts(queue.transcriber),
            scores=model_scores(queue.transcriber),
            waiting=queue.n_taken,
            places=queue.n_slots,
        )


def _add_docs(api: FastAPI) -> None:
    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page.render(api.openapi()), headers={"Content-Security-Policy": docs_page.POLICY})


def _unknown_model() -> Refusal:
    return Refusal(404, "this server does not serve that model: see GET /v1/models", "model_not_found", param="model")


def _check_language(requested: str, served: str) -> None:
    """Raise Refusal (400) unless the language is the served one, in any notation, empty or `auto`."""
    try:
        code = languages.parse_optional(requested)
    except LabError as error:
        raise Refusal(400, str(error), param="language") from None
    if code not in ("", served):
        raise Refusal(400, f"this server transcribes {served} only: leave language out", param="language")


def _check_word_times(transcriber: Transcriber, response_format: Format) -> None:
    """Raise Refusal (400) if the format has no word times or the model does not support them."""
    if response_format is not Format.verbose_json:
        raise Refusal(400, "word times are available in verbose_json only", param=GRANULARITIES)
    if not transcriber.times_words:
        raise Refusal(400, "this server's model does not support word times: leave word out", param=GRANULARITIES)


async def _handle_http_error(request: Request, error: HTTPException) -> Response:
    if isinstance(error, Refusal):
        return error.response()
    headers = dict(error.headers or {})
    return Refusal(error.status_code, str(error.detail), headers=headers).response()


async def _handle_invalid_fields(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = next((str(part) for part in first["loc"][1:]), None)
    message = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param}: {message}" if param else message, param=param).response()


async def _handle_unexpected_error(request: Request, error: Exception) -> Response:
    """Hide the error from the client; its traceback is in the server's log."""
    return Refusal(500, "something went wrong on the server; see its log").response()


def _adapt_schema(api: FastAPI, token: str) -> None:
    """Correct FastAPI's schema: invalid fields are 400 instead of 422, and a `token` is required if it is set."""
    schema = api.openapi()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if token and path not in PUBLIC_PATHS:
                operation["security"] = [{"token": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if token:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
