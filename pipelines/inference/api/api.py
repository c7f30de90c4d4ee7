"""The routes of the API: OpenAI's transcriptions and models, /predict, /health and the documentation."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pipelines.inference.api import docs_page
from pipelines.inference.api.forms import FILE, FormRoute, refuse_other_fields
from pipelines.inference.api.middleware import PUBLIC_PATHS, Access, ApiMiddleware
from pipelines.inference.api.model_names import DEFAULT, ModelNames
from pipelines.inference.api.queue import Limits, TranscriptionQueue
from pipelines.inference.api.realtime import PATH as REALTIME
from pipelines.inference.api.realtime import add_realtime
from pipelines.inference.api.responses import (
    DAMAGE_HEADER,
    model_entry,
    model_facts,
    model_scores,
    open_upload,
    prediction,
)
from pipelines.inference.api.schemas import ERRORS, OTHER_MODEL, Health, Model, Models, Prediction
from pipelines.inference.api.transcriptions import (
    TRANSCRIPTIONS,
    TRANSLATIONS,
    add_transcriptions,
    add_translations,
)
from pipelines.inference.http.guard import Refusal
from pipelines.inference.transcriber import Transcriber

PREDICT = "/predict"

_DESCRIPTION = f"""Speech to text by a Whisper model that was fine-tuned for one language.

`POST {TRANSCRIPTIONS}` is compatible with OpenAI's clients: set their base URL to this server's address with `/v1`.
So is the WebSocket `{REALTIME}?intent=transcription`, for a microphone that stays open.
One recording is decoded at a time and the others wait. If too many are waiting, the response is 503 with the header
Retry-After. Recordings are deleted with their request; they are neither stored nor logged."""


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
    transcriber: Transcriber,
    limits: Limits | None = None,
    access: Access | None = None,
    aliases: Collection[str] = (),
) -> FastAPI:
    """Create the API around `transcriber`.

    With a token, all routes but /health, /openapi.json and /docs require it as a bearer token. `aliases` are further
    names of the model.
    """
    access = access or Access()
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
        servers=[{"url": access.root_path}] if access.root_path else None,
        lifespan=lifespan,
    )
    api.router.route_class = FormRoute
    names = ModelNames(transcriber.ref, aliases)
    add_transcriptions(api, queue, names)
    add_translations(api, queue, names)
    add_realtime(api, queue, names)
    _add_predict(api, queue)
    _add_models(api, transcriber, names)
    _add_health(api, queue)
    _add_docs(api)
    api.add_middleware(ApiMiddleware, queue=queue, access=access, queued_paths={TRANSCRIPTIONS, TRANSLATIONS, PREDICT})
    api.add_middleware(  # added last: it comes first, before the token
        CORSMiddleware,
        allow_origins=list(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", DAMAGE_HEADER],
    )
    api.add_exception_handler(HTTPException, _handle_http_error)
    api.add_exception_handler(RequestValidationError, _handle_invalid_fields)
    api.add_exception_handler(Exception, _handle_unexpected_error)
    _adapt_schema(api, access.token)
    return api


def _add_predict(api: FastAPI, queue: TranscriptionQueue) -> None:
    body = {"required": True, "content": {**dict.fromkeys(_AUDIO_TYPES, _BINARY), "multipart/form-data": _FORM}}

    @api.post(
        PREDICT,
        response_model=Prediction,
        response_model_exclude_none=True,
        responses=ERRORS,
        summary="Transcribe a recording",
        description="The body is the audio file itself, or a form with one `file`.",
        openapi_extra={"requestBody": body},
    )
    async def predict(request: Request) -> Prediction:
        async with open_upload(request) as upload:
            await refuse_other_fields(request, (FILE,))
            return prediction(await queue.transcribe(upload, request))


def _add_models(api: FastAPI, transcriber: Transcriber, names: ModelNames) -> None:
    denied = {401: ERRORS[401]}

    @api.get("/v1/models", response_model=Models, responses=denied, summary="List the served model (OpenAI's API)")
    async def models() -> Models:
        return Models(data=[model_entry(transcriber)])

    @api.get(
        "/v1/models/{model:path}",  # names of Hub models contain a slash
        response_model=Model,
        responses={404: OTHER_MODEL, **denied},
        summary="Describe the model of this name (OpenAI's API)",
    )
    async def one_model(
        model: Annotated[str, PathParameter(description=f"The model's name, or an alias such as {DEFAULT}.")],
    ) -> Model:
        names.check(model)
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
