"""Messages of a live session's client, and its settings in the two forms that OpenAI's clients send: `session.update`
and, before 2025-09, `transcription_session.update`. A setting that this server would ignore is refused."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.inference.api.model_names import DEFAULT, ModelNames
from pipelines.inference.api.transcriptions import MAX_CHARS, configure
from pipelines.inference.http.guard import Refusal
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.turns import ALAW, PCM, ULAW, TurnSettings
from pipelines.infra.errors import LabError

CLIENT_EVENTS = (
    "session.update", "transcription_session.update", "input_audio_buffer.append", "input_audio_buffer.commit",
    "input_audio_buffer.clear",
)  # fmt: skip
LOGPROBS = "item.input_audio_transcription.logprobs"
MIN_COMMIT_S = 0.1
"""Shortest audio that can be committed, as with OpenAI."""
MAX_MESSAGE_CHARS = 4_000_000
"""Longest message: a minute of 24 kHz PCM in base64."""
_TELEPHONE_HZ = 8_000
_OLD_FORMATS = {"pcm16": PCM, "g711_ulaw": ULAW, "g711_alaw": ALAW}
_MIN_HZ, _MAX_HZ = 8_000, 48_000
_RANGES = {
    "threshold": (0.01, 0.99, "threshold", 1.0),
    "prefix_padding_ms": (0, 1_000, "padding_s", 1000.0),
    "silence_duration_ms": (100, 10_000, "silence_s", 1000.0),
}
"""Name of a setting to its smallest and largest value, its name in TurnSettings, and its units per unit there."""
_NO_EFFECT = ("create_response", "interrupt_response")
"""Settings of conversations: a transcription has no responses that they could start or end."""


def check_query(query: Mapping[str, str], names: ModelNames) -> None:
    """Raise Refusal if the address of a session asks for something else than a transcription by this model."""
    if query.get("intent", "transcription") != "transcription":
        raise Refusal(400, "this server only transcribes: connect with intent=transcription", param="intent")
    if "model" in query:
        names.check(query["model"])


def parse_message(message: str | bytes) -> dict[str, Any]:
    """Return a message as an object with a `type`. Raises Refusal."""
    if len(message) > MAX_MESSAGE_CHARS:
        raise Refusal(400, f"a message has at most {MAX_MESSAGE_CHARS} characters", "message_too_large")
    try:
        event = json.loads(message)
        json.dumps(event, ensure_ascii=False).encode()  # half of a surrogate pair could be neither used nor returned
    except (ValueError, RecursionError):
        raise Refusal(400, "a message must be a JSON object in UTF-8", "invalid_json") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise Refusal(400, "a message must be a JSON object with a type", "invalid_event", param="type")
    return event


logger = logging.getLogger("uvicorn.error")


@dataclass
class Item:
    """A turn, and what is transcribed of it."""

    id: str = field(default_factory=lambda: f"item_{secrets.token_hex(10)}")
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    audio_s: float = 0.0
    failure: Refusal | None = None


@dataclass(frozen=True)
class SessionSettings:
    """What a client can set for its session."""

    encoding: str = PCM
    rate_hz: int = 24_000
    turns: TurnSettings | None = field(default_factory=TurnSettings)
    """None: the client commits its audio itself."""
    model: str = DEFAULT
    language: str = ""
    prompt: str = ""
    hotwords: tuple[str, ...] = ()
    with_logprobs: bool = False

    def configure(self, transcriber: Transcriber) -> Transcriber:
        """Return the transcriber of the session. Raises Refusal."""
        path = "session.audio.input.transcription."
        return configure(transcriber, language=self.language, prefix=path, prompt=self.prompt, hotwords=self.hotwords)

    def updated(self, session: Any, names: ModelNames, transcriber: Transcriber) -> SessionSettings:
        """Return the settings after an update with OpenAI's object `session`; absent fields stay.

        Raises Refusal for anything that this server does not support.
        """
        fields = _flat_fields(session)
        settings = self
        if "format" in fields:
            settings = replace(settings, **_parse_format(*fields.pop("format")))
        if "transcription" in fields:
            settings = replace(settings, **_parse_transcription(*fields.pop("transcription"), names))
            settings.configure(transcriber)
        if "include" in fields:
            settings = replace(settings, with_logprobs=_parse_include(*fields.pop("include")))
        if "turn_detection" in fields:
            settings = replace(settings, turns=_parse_turns(*fields.pop("turn_detection"), self.turns))
        for path, value in fields.values():
            if value not in (None, []):
                raise _refusal(path, "is not supported here: leave it out")
        return settings

    def as_dict(self, is_old: bool) -> dict[str, Any]:
        """Return OpenAI's object; `is_old` selects the form before 2025-09."""
        transcription = {"model": self.model, "language": self.language or None, "prompt": self.prompt}
        include = [LOGPROBS] if self.with_logprobs else []
        turns = self.turns and {
            "type": "server_vad",
            "threshold": self.turns.threshold,
            "prefix_padding_ms": round(self.turns.padding_s * 1000),
            "silence_duration_ms": round(self.turns.silence_s * 1000),
        }
        if is_old:
            name = next(name for name, encoding in _OLD_FORMATS.items() if encoding == self.encoding)
            old = {"input_audio_format": name, "input_audio_transcription": transcription, "turn_detection": turns}
            return {"object": "realtime.transcription_session", **old, "include": include}
        audio_format = {"type": self.encoding, **({"rate": self.rate_hz} if self.encoding == PCM else {})}
        inputs = {"format": audio_format, "transcription": transcription, "turn_detection": turns}
        audio = {"input": {**inputs, "noise_reduction": None}}
        return {"object": "realtime.transcription_session", "type": "transcription", "audio": audio, "include": include}


def _flat_fields(session: Any) -> dict[str, tuple[str, Any]]:
    """Return the fields of either form: name in the current form to path and value."""
    top = _fields(
        session,
        "session",
        ("type", "id", "object", "expires_at", "audio", "include", "input_audio_format", "input_audio_transcription",
         "input_audio_noise_reduction", "turn_detection"),
    )  # fmt: skip
    if top.get("type", "transcription") != "transcription":
        raise _refusal("session.type", "must be transcription: this server only transcribes")
    fields = {name: (f"session.{name}", top[name]) for name in ("include", "turn_detection") if name in top}
    if "audio" in top:
        audio = _fields(top["audio"], "session.audio", ("input",))
        given = _fields(
            audio.get("input", {}),
            "session.audio.input",
            ("format", "transcription", "noise_reduction", "turn_detection"),
        )
        fields |= {name: (f"session.audio.input.{name}", value) for name, value in given.items()}
    if "input_audio_format" in top:
        old = top["input_audio_format"]
        if not isinstance(old, str) or old not in _OLD_FORMATS:
            raise _refusal("session.input_audio_format", f"must be one of {', '.join(_OLD_FORMATS)}")
        fields["format"] = ("session.input_audio_format", {"type": _OLD_FORMATS[old]})
    for name in ("transcription", "noise_reduction"):
        if f"input_audio_{name}" in top:
            fields[name] = (f"session.input_audio_{name}", top[f"input_audio_{name}"])
    return fields


def _parse_format(path: str, value: Any) -> dict[str, Any]:
    fields = _fields(value, path, ("type", "rate"))
    encoding = fields.get("type", PCM)
    if encoding not in (PCM, ULAW, ALAW):
        raise _refusal(f"{path}.type", f"must be {PCM}, {ULAW} or {ALAW}")
    usual_hz = SessionSettings.rate_hz if encoding == PCM else _TELEPHONE_HZ
    rate_hz = usual_hz if fields.get("rate") is None else fields["rate"]
    lowest, highest = (_MIN_HZ, _MAX_HZ) if encoding == PCM else (_TELEPHONE_HZ, _TELEPHONE_HZ)
    if type(rate_hz) is not int or not lowest <= rate_hz <= highest:
        raise _refusal(f"{path}.rate", f"must be a whole number from {lowest} to {highest} for {encoding}")
    return {"encoding": encoding, "rate_hz": rate_hz}


def _parse_transcription(path: str, value: Any, names: ModelNames) -> dict[str, Any]:
    fields = _fields(value, path, ("model", "language", "prompt", "keywords"))
    settings = {name: text for name, text in fields.items() if text is not None}
    hotwords = settings.pop("keywords", None)
    for name, text in settings.items():
        if not isinstance(text, str) or len(text) > MAX_CHARS:
            raise _refusal(f"{path}.{name}", f"must be a string of at most {MAX_CHARS} characters")
    if "model" in settings:
        names.check(settings["model"], f"{path}.model")
    if hotwords is not None:
        if not isinstance(hotwords, list) or len(hotwords) > 1_000 or not all(map(_is_hotword, hotwords)):
            raise _refusal(f"{path}.keywords", "must be a list of at most 1000 words")
        settings["hotwords"] = tuple(word.strip() for word in hotwords)
    return settings


def _is_hotword(word: Any) -> bool:
    return isinstance(word, str) and 0 < len(word.strip()) <= 100


def _parse_include(path: str, value: Any) -> bool:
    if value not in (None, [], [LOGPROBS]):
        raise _refusal(path, f"must be empty or [{LOGPROBS}]")
    return value == [LOGPROBS]


def _parse_turns(path: str, value: Any, current: TurnSettings | None) -> TurnSettings | None:
    if value is None:
        return None
    fields = _fields(value, path, ("type", "idle_timeout_ms", *_RANGES, *_NO_EFFECT))
    if fields.get("type", "server_vad") != "server_vad":
        raise _refusal(f"{path}.type", "must be server_vad, or turn_detection must be null")
    if fields.get("idle_timeout_ms") is not None:
        raise _refusal(f"{path}.idle_timeout_ms", "is not supported here: leave it out")
    changes = {}
    for name, (lowest, highest, setting, units) in _RANGES.items():
        number = fields.get(name)
        if number is None:
            continue
        if type(number) not in (int, float) or not lowest <= number <= highest:
            raise _refusal(f"{path}.{name}", f"must be a number from {lowest} to {highest}")
        changes[setting] = number / units
    return replace(current or TurnSettings(), **changes)


def _fields(value: Any, path: str, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(path, "must be an object")
    for name in value:
        if name not in known:
            printable = "".join(letter if letter.isprintable() else "?" for letter in name[:40])
            raise _refusal(f"{path}.{printable}", f"is not supported here: leave it out; known are {', '.join(known)}")
    return value


def _refusal(path: str, message: str) -> Refusal:
    return Refusal(400, f"{path} {message}", "invalid_value", param=path)


def nothing_to_commit(seconds: float) -> Refusal:
    """Return the error of a commit of less than MIN_COMMIT_S."""
    return Refusal(
        400,
        f"nothing to commit: {seconds * 1000:.0f} ms of speech, expected at least {MIN_COMMIT_S * 1000:g} ms",
        "input_audio_buffer_commit_empty",
    )


def transcription_failure(error: Exception) -> Refusal:
    """Return what the client is sent of an error while a turn is transcribed; log it if it is no wrong option."""
    if isinstance(error, LabError):  # of an option that the engine or the model lacks
        return Refusal(400, str(error), "unsupported_value")
    logger.error("a part of a live session could not be transcribed", exc_info=error)
    return Refusal(500, "something went wrong on the server; see its log", "transcription_failed")
