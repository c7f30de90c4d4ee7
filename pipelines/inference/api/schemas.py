"""Responses of the API: transcripts and errors in OpenAI's format, the model and its health."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from pipelines.inference.channels import WRONG_NUMBER
from pipelines.inference.http.guard import Refusal
from pipelines.speech.audio import DAMAGED, AudioError

_AUDIO_ERRORS = {
    "empty": "the file contains no audio",
    "not_finite": "the file contains NaN, infinite or extremely large samples",
}
_UNREADABLE = "the file is not audio that this server can read; wav, flac, mp3 and ogg are always supported"


def audio_refusal(error: AudioError) -> Refusal:
    """Return the response to unusable audio.

    Of the decoder's own message only durations are passed on, since it may contain local paths.
    """
    if error.reason == "too_long":
        return Refusal(413, f"the recording is too long: {error.detail}", "audio_too_long", param="file")
    if error.reason == WRONG_NUMBER:
        return Refusal(400, error.detail, "invalid_audio", param="channel_names")
    if error.reason == "no_track":
        return Refusal(400, error.detail, "invalid_audio", param="track")
    if error.reason == DAMAGED:
        return Refusal(400, f"the recording is damaged: {error.detail}", "invalid_audio", param="file")
    return Refusal(400, _AUDIO_ERRORS.get(error.reason, _UNREADABLE), "invalid_audio", param="file")


class Problem(BaseModel):
    """An error, in one line."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The field at fault, if there is one.")
    code: str | None


class Failure(BaseModel):
    """OpenAI's error object."""

    error: Problem


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "Not audio, or a wrong field"},
    401: {"model": Failure, "description": "The token is missing or wrong"},
    408: {"model": Failure, "description": "The request arrived too slowly"},
    413: {"model": Failure, "description": "The request is too large or the recording too long"},
    429: {
        "model": Failure,
        "description": "Too many requests or seconds of audio from this address in a minute: try again later",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    503: {
        "model": Failure,
        "description": "Too many requests are waiting: try again later",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    504: {"model": Failure, "description": "Not done in time"},
}
"""Responses of the routes that transcribe."""
OTHER_MODEL = {"model": Failure, "description": "This server does not serve that model"}

_DAMAGE = Field(None, description="What could not be read of a damaged recording; left out if nothing is lost.")


class Logprob(BaseModel):
    """The log-probability of a word, in OpenAI's object for tokens."""

    token: str = Field(description="The word, after a space.")
    bytes: list[int] = Field(description="The word in UTF-8.")
    logprob: float = Field(description="Natural logarithm of the probability, not calibrated.")


class Transcription(BaseModel):
    """`response_format=json`."""

    text: str
    logprobs: list[Logprob] | None = Field(None, description="With `include[]=logprobs`.")
    damage: str | None = _DAMAGE


_SPEAKER = Field(None, description="Name of the channel, with `channels=split`; else left out.")


class TimedWord(BaseModel):
    """A word, its times and the probability that it is correct."""

    word: str
    speaker: str | None = _SPEAKER
    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds: the start of the next word, or the end of the speech before it.")
    probability: float = Field(ge=0, le=1, description="The probability that the word is correct.")


class TimedSegment(BaseModel):
    """The transcript of one part of the recording."""

    id: int
    seek: int = Field(description="Start of the segment, in hundredths of a second.")
    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds.")
    speaker: str | None = _SPEAKER
    text: str = Field(description="It begins with a space, as Whisper writes it.")
    tokens: list[int] = Field(description="Token ids of the text, without times and control tokens.")
    temperature: float = Field(
        ge=0, le=1, description="Sampling temperature; above 0 if the first attempt repeated itself."
    )
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float = Field(
        ge=0,
        le=1,
        description="Probability of Whisper's no-speech token at the start of the segment's window. Sounds without "
        "speech are found by a detector and have no segment.",
    )
    confidence: float = Field(ge=0, le=1, description="The expected share of correct words.")
    word_confidences: list[float] = Field(description="For each word the probability that it is correct.")
    words: list[TimedWord] | None = Field(None, description="If word times were requested; each begins with a space.")


class VerboseTranscription(BaseModel):
    """`response_format=verbose_json`."""

    task: Literal["transcribe", "translate"]
    language: str = Field(description="The language's English name in small letters, as OpenAI gives it.")
    duration: float = Field(description="Duration of the recording, in seconds.")
    text: str
    confidence: float = Field(ge=0, le=1, description="The expected share of correct words.")
    damage: str | None = _DAMAGE
    segments: list[TimedSegment]
    words: list[TimedWord] | None = Field(None, description="Words of all segments, if word times were requested.")


class Prediction(BaseModel):
    """The response of /predict."""

    text: str
    confidence: float = Field(ge=0, le=1, description="The expected share of correct words.")
    damage: str | None = _DAMAGE
    duration_s: float
    elapsed_s: float = Field(description="Seconds of decoding, without the time in the queue.")


class Model(BaseModel):
    """A model, as in OpenAI's list."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0 if unknown.")
    owned_by: str


class Models(BaseModel):
    """The one model that this server serves."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The state of the server and its model."""

    status: Literal["ok"] = "ok"
    model: dict[str, str] = Field(description="Name, revision, base, engine, and the date of creation if it is known.")
    scores: dict[str, float | int | bool | list[float]] = Field(
        description="Scores on the test split of the model's data; empty if it was not evaluated."
    )
    waiting: int = Field(description="Requests that are being decoded or wait for it.")
    places: int = Field(description="Maximum of `waiting`; further requests get 503.")
