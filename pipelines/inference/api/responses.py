"""Convert transcripts and the model's facts to responses, and read uploads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from typing import Any, BinaryIO, NamedTuple

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference import subtitles
from pipelines.inference.api.forms import is_multipart
from pipelines.inference.api.model_names import model_name
from pipelines.inference.api.schemas import Model, Prediction
from pipelines.inference.http.guard import Refusal
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Segment, Transcript

DAMAGE_HEADER = "X-Audio-Damage"
"""Header of a response that says what could not be read of the recording."""
_MAX_MEMORY_BYTES = 1 << 20
"""A larger body is stored in an unnamed temporary file."""


class Format(StrEnum):
    """Format of a transcript."""

    json = "json"
    text = "text"
    srt = "srt"
    verbose_json = "verbose_json"
    vtt = "vtt"


class ResponseStyle(NamedTuple):
    """What a client has asked for."""

    response_format: Format
    word_times: bool = False
    logprobs: bool = False
    subtitles: subtitles.Style = subtitles.DEFAULT


def transcript_response(transcript: Transcript, style: ResponseStyle, transcriber: Transcriber) -> Response:
    """Return the transcript as requested; damage of the recording is in a header, and in JSON a field."""
    headers = {DAMAGE_HEADER: transcript.damage} if transcript.damage else {}
    if style.response_format is Format.srt:
        return Response(subtitles.srt(transcript, style.subtitles), media_type="application/x-subrip", headers=headers)
    if style.response_format is Format.vtt:
        return Response(subtitles.vtt(transcript, style.subtitles), media_type="text/vtt", headers=headers)
    if style.response_format is Format.text:
        return Response(f"{transcript.text}\n", media_type="text/plain", headers=headers)
    if style.response_format is Format.verbose_json:
        task = transcriber.options.task
        fields = subtitles.as_dict(transcript, transcriber.language, style.word_times, transcriber.ref.folder)
        english = {"language": "english"} if task == "translate" else {}
        return JSONResponse({**fields, "task": task, **english}, headers=headers)
    fields = {"damage": transcript.damage} if transcript.damage else {}
    if style.logprobs:
        fields["logprobs"] = [entry for segment in transcript.segments for entry in logprobs(segment)]
    return JSONResponse({"text": transcript.text, **fields}, headers=headers)


def logprobs(segment: Segment) -> list[dict[str, Any]]:
    """Return the words of a segment as OpenAI's objects of tokens: log-probabilities of words, before calibration."""
    return [
        {"token": (token := f" {word.text}"), "bytes": list(token.encode()), "logprob": round(word.logprob, 5)}
        for word in segment.words
    ]


def prediction(transcript: Transcript) -> Prediction:
    """Return the response of /predict."""
    return Prediction(
        text=transcript.text,
        damage=transcript.damage or None,
        confidence=round(transcript.confidence, 4),
        duration_s=round(transcript.audio_s, 3),
        elapsed_s=round(transcript.elapsed_s, 3),
    )


def model_entry(transcriber: Transcriber) -> Model:
    """Return the model as an entry of OpenAI's model list."""
    created = transcriber.ref.facts.get("made")
    timestamp_s = int(datetime.fromisoformat(created).timestamp()) if created else 0
    return Model(id=model_name(transcriber.ref), created=timestamp_s, owned_by="swedish-whisper-lab")


def model_facts(transcriber: Transcriber) -> dict[str, str]:
    """Return the model's public facts, its engine, its language and, if recorded, when it was created."""
    info = inference_pipeline.model_info(transcriber.ref)
    info.pop("test", None)
    facts = {**info, "engine": transcriber.loaded.name, "language": transcriber.language}
    created = transcriber.ref.facts.get("made")
    return {**facts, "made": created} if created else facts


def model_scores(transcriber: Transcriber) -> dict[str, Any]:
    """Return the numbers among the model's test scores; texts of a manifest may be private."""
    scores = transcriber.ref.facts.get("test") or {}
    return {name: value for name, value in scores.items() if _is_numeric(value)}


def _is_numeric(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, int | float) for one in values)


@contextlib.asynccontextmanager
async def open_upload(request: Request) -> AsyncIterator[BinaryIO]:
    """Yield the recording in the body of a request, raw or as the form field `file`, as an unnamed file."""
    if is_multipart(request):
        async with request.form(max_files=1, max_fields=10) as form:
            file = form.get("file")
            if not hasattr(file, "file"):
                raise Refusal(400, "file: the form contains no file of this name", param="file")
            yield file.file
        return
    with tempfile.SpooledTemporaryFile(_MAX_MEMORY_BYTES) as file:
        async for chunk in request.stream():
            file.write(chunk)
        yield file
