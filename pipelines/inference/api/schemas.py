"""What the API answers: transcripts and errors in OpenAI's shapes, the model, its health."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from pipelines.inference import subtitles
from pipelines.inference.transcriber import Transcript
from pipelines.speech import repetition
from pipelines.speech.audio import DAMAGED, AudioError


class Refusal(HTTPException):
    """A request that is not answered with a transcript: the status, one line, and where it can be named the field."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def response(self) -> JSONResponse:
        """The answer in OpenAI's shape."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        told = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": told}, self.status_code, self.headers)


_OF_AUDIO = {
    "empty": "the file holds no sound",
    "not_finite": "the file holds samples that are no numbers (NaN or infinite)",
}
_UNREADABLE = "the file is not audio that this server can read; wav, flac, mp3 and ogg always are"


def refused(error: AudioError) -> Refusal:
    """The answer to audio that cannot be used. Only durations are told of what the decoder said: it may name places."""
    if error.reason == "too_long":
        return Refusal(413, f"the recording is too long: {error.detail}", "audio_too_long", param="file")
    if error.reason == DAMAGED:
        return Refusal(400, f"the recording is damaged: {error.detail}", "invalid_audio", param="file")
    return Refusal(400, _OF_AUDIO.get(error.reason, _UNREADABLE), "invalid_audio", param="file")


class Problem(BaseModel):
    """What is wrong, in one line."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str | None


class Failure(BaseModel):
    """Every answer that is none: OpenAI's error object."""

    error: Problem


class Transcription(BaseModel):
    """`response_format=json`."""

    text: str


class Word(BaseModel):
    """A word; where its time was asked for, with it."""

    word: str
    start: float | None = Field(None, description="Seconds; only where times of words were asked for.")
    end: float | None = Field(None, description="Seconds: where the next word begins, or the segment ends.")
    confidence: float = Field(ge=0, le=1, description="The probability that the word is right.")


class TimedWord(Word):
    """A word and when it is said."""

    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds: where the next word begins, or the segment ends.")


class TimedSegment(BaseModel):
    """What was said in a stretch of the recording."""

    id: int
    seek: int = Field(description="Where the segment begins, in hundredths of a second.")
    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds.")
    text: str
    tokens: list[int] = Field(description="Always empty: this server keeps no tokens.")
    temperature: float = Field(
        ge=0, le=1, description="At which it was decoded: above 0 where its text went in circles at first."
    )
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float = Field(
        ge=0,
        le=1,
        description="Of a segment that was doubted: its first avg_logprob was below -1. 0 for all others, for which it "
        "is not computed. A segment without speech is left out.",
    )
    confidence: float = Field(ge=0, le=1, description="The share of its words that is expected to be right.")
    words: list[Word]


class VerboseTranscription(BaseModel):
    """`response_format=verbose_json`."""

    task: Literal["transcribe"]
    language: str
    duration: float = Field(description="Of the recording, in seconds.")
    text: str
    confidence: float = Field(ge=0, le=1, description="The share of all words that is expected to be right.")
    segments: list[TimedSegment]
    words: list[TimedWord] | None = Field(None, description="Of all segments, where times of words were asked for.")


class Prediction(BaseModel):
    """What /predict answers."""

    text: str
    confidence: float = Field(ge=0, le=1, description="The share of the words that is expected to be right.")
    duration_s: float
    elapsed_s: float = Field(description="From the recording to the text, without waiting for its turn.")


class Model(BaseModel):
    """A model, as OpenAI's list has it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0 where the model does not tell.")
    owned_by: str


class Models(BaseModel):
    """The one model that is served here."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The server answers, and this is what it serves."""

    status: Literal["ok"] = "ok"
    model: dict[str, str] = Field(description="Name, revision, base, engine, and the day it was made where it tells.")
    scores: dict[str, float | int | bool | list[float]] = Field(
        description="On its own test split; empty if not scored."
    )
    waiting: int = Field(description="Requests that are being answered or wait for their turn.")
    places: int = Field(description="As many may be at once; the next one is told to come again.")


def verbose(transcript: Transcript, language: str, word_times: bool = False) -> dict[str, Any]:
    """The fields of VerboseTranscription: those of subtitles.as_dict, and the rest of OpenAI's that are known."""
    told = subtitles.as_dict(transcript, language)
    for segment in told["segments"]:
        segment |= {
            "seek": round(segment["start"] * 100),
            "tokens": [],
            "compression_ratio": round(repetition.compression_ratio(segment["text"]), 4),
        }
    if word_times:
        told["words"] = [word for segment in told["segments"] for word in segment["words"]]
    return told
